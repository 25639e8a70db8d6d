"""Archives: images are read without unpacking, and a run equals one on the unpacked folder."""

import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from commands import ROOT, content, metrics, run
from made_data import bundled, make_picture
from PIL import Image

import train_var_cca
from cca.data import archives
from cca.data.archives import Archive
from cca.data.datasets import open_labelled_images
from cca.data.image_sets import open_image_set
from cca.training.trainer import Trainer
from models import UserError, load_model
from models.utils.files import cache_folder

KINDS = ("stored.zip", "deflated.zip", "data.tar", "nested.tar")


def add(tar, name, data, **fields):
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for field, value in fields.items():
        setattr(entry, field, value)
    tar.addfile(entry, io.BytesIO(data))


def make_zip(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def make_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            add(tar, f"./{name}", data)


def make_nested(path, files):
    """Write a tar that holds one tar per class, as in the download of ImageNet's training set."""
    with tarfile.open(path, "w") as outer:
        for folder in dict.fromkeys(name.split("/")[0] for name in files):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for name, data in files.items():
                    if name.startswith(f"{folder}/"):
                        add(tar, name.partition("/")[2], data)
            add(outer, f"{folder}.tar", inner.getvalue())


def make_archives(files):
    """Write one archive of each of KINDS to the current folder, with the members in reverse order."""
    files = {name: files[name] for name in sorted(files, reverse=True)}
    make_zip("stored.zip", files)
    make_zip("deflated.zip", files, zipfile.ZIP_DEFLATED)
    make_tar("data.tar", files)
    make_nested("nested.tar", files)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write JPEGs of three classes, one of them damaged, to ``data/`` and to archives.

    Return the contents of the JPEGs by name.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i, (image, label) in enumerate(zip(*bundled(60).values())):
        if label < 3:
            target = Path("data", str(label), f"é{i:02d}.JPEG")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize((40, 48)).save(target)
    broken = sorted(Path("data/2").iterdir())[1]
    broken.write_bytes(broken.read_bytes()[:100])
    contents = {str(path.relative_to("data")): path.read_bytes() for path in Path("data").rglob("*.JPEG")}
    make_archives(contents)
    return contents


@pytest.fixture(scope="module")
def model():
    return load_model("var-mini")


def describe(data):
    items = [data[1, index] for index in range(len(data))]
    pixels = b"".join(pixels.numpy().tobytes() for pixels, _ in items)
    unreadable = [data.source.record(i) for i in sorted(data.unreadable)]
    return data.source.keys, data.all_labels.tolist(), data.classes, pixels, data.fingerprint(), unreadable


@pytest.mark.parametrize("kind", KINDS)
def test_archive_equals_folder(files, model, kind):
    folder, archive = (open_labelled_images(Path(name), model) for name in ("data", kind))
    assert describe(folder) == describe(archive) and len(archive.unreadable) == 1
    for name in files:
        if "2/" in name:
            Path("data", name).unlink()
    sets = []
    for name in ("data", kind):
        images = open_image_set(Path(f"{name}/1"), resolution=32)
        pixels = np.concatenate(list(images.batches(slice(0, len(images)), 4)))
        sets.append((pixels.tobytes(), images.content_hash(), images.fingerprint()))
    assert sets[0] == sets[1]


def train(data, output, *options):
    line = ["--model", "var-mini", "--data", data, "--output", output, "--batch-size", "4"]
    train_var_cca.main([*line, "--max-steps", "4", "--save-every", "2", *options])
    rows = [{k: v for k, v in row.items() if k != "images_per_second"} for row in metrics(Path(output))]
    config = json.loads(Path(output, "config.json").read_text())
    return rows, Path(output, "model.pth").read_bytes(), config["options"], config["unreadable"]


@pytest.mark.parametrize("kind", ["deflated.zip", "nested.tar"])
def test_training_from_archive_equals_folder(files, kind, monkeypatch):
    """Results are equal bit for bit, also if a run starts with the folder and resumes with the archive."""
    whole = train("data", "run")
    assert train(kind, "alone", "--workers", "2") == whole
    step = Trainer.optimizer_step

    def interrupt(trainer, done, batch):
        if done == 3:
            raise KeyboardInterrupt
        return step(trainer, done, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimizer_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train("data", "resumed")
    assert train(kind, "resumed") == whole


def exit_with_wrong_reads(archive, files, seed):
    """Read the files of an archive in random order, and exit with the number of wrong reads."""
    names = np.random.default_rng(seed).permutation(sorted(files) * 100).tolist()
    wrong = 0
    for name in names:
        try:
            wrong += archive.open(name).read() != files[name]
        except OSError:
            wrong += 1
    sys.exit(min(wrong, 255))


@pytest.mark.parametrize("kind", ["stored.zip", "data.tar"])
def test_forked_processes_read_one_archive(files, kind):
    """With a shared file position, processes would read the images of each other."""
    archive = Archive(Path(kind))
    fork = multiprocessing.get_context("fork").Process
    readers = [fork(target=exit_with_wrong_reads, args=(archive, files, seed)) for seed in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0] * 4


def test_workers_of_several_ranks_read_one_archive(files):
    line = ["-m", "scripts.extract_codes", "--model", "llamagen-mini", "--batch-size", "20"]
    place = Path.cwd()
    run(*line, "--data", place / "data", "--output", place / "of-folder", "--workers", "0")
    options = ["--data", place / "nested.tar", "--output", place / "of-tar", "--workers", "2"]
    run(*line, *options, processes=3)
    assert content(place / "of-tar") == content(place / "of-folder")


def test_index_is_cached_until_the_archive_changes(files, model, monkeypatch):
    first = open_labelled_images(Path("data.tar"), model)
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_list_tar", lambda *_: pytest.fail("listed again"))
        assert open_labelled_images(Path("data.tar"), model).source.keys == first.source.keys
    (index_file,) = (cache_folder() / "archives").glob("*.npz")  # the same file after each change
    for change in (
        lambda: index_file.write_bytes(index_file.read_bytes()[:-50]),
        lambda: make_nested("data.tar", files),
    ):
        change()
        assert open_labelled_images(Path("data.tar"), model).source.keys == first.source.keys
        assert [*index_file.parent.glob("*.npz")] == [index_file]
    index = index_file.read_bytes()
    with monkeypatch.context() as patch:  # a node that has another archive at this path
        patch.setattr(archives.socket, "gethostname", lambda: "another")
        make_nested("data.tar", files)
        open_labelled_images(Path("data.tar"), model)
    assert index_file.read_bytes() == index
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # the index cannot be stored
    assert open_labelled_images(Path("data.tar"), model).source.keys == first.source.keys


def test_folder_in_an_archive(files, model):
    for name, maker in (("a.zip", make_zip), ("a.tar", make_tar)):
        inner = {f"ILSVRC/Data/train/{name}": data for name, data in files.items()}
        maker(name, {**inner, "ILSVRC/Data/val/a.JPEG": b"", "ILSVRC/.hidden/a.JPEG": b"", "list.csv": b""})
        data = open_labelled_images(Path(name, "ILSVRC/Data"), model)
        assert data.source.keys == open_labelled_images(Path("data"), model).source.keys
        assert data.source.path(0).startswith(f"{name}/ILSVRC/Data/train/0/")
        with pytest.raises(UserError, match=f"{name}: holds no folder ILSVRC/Date"):
            open_labelled_images(Path(name, "ILSVRC/Date"), model)


def test_links_and_duplicate_names(tmp_path, monkeypatch, model):
    """Links are left out. If several members have the same name, the last one is read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pictures = [io.BytesIO(), io.BytesIO()]
    for grey, file in zip((10, 200), pictures):
        Image.new("L", (32, 32), grey).save(file, "png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in pictures:
            add(tar, "1/a.png", file.getvalue())
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            add(tar, f"1/{kind!r}.png", b"", type=kind, linkname="a.png")
    data = open_labelled_images(tmp_path / "a.tar", model)
    assert len(data) == 1 and "2 other files are left out" in data.notes()[0]
    assert int(data[0, 0][0].float().mean()) == 200


def test_damaged_members_are_unreadable(files, model):
    for kind in ("stored.zip", "deflated.zip"):
        data = open_labelled_images(Path(kind), model)
        row = data.source.folder._member(data.source.names[0])
        content = bytearray(Path(kind).read_bytes())
        content[row[0] + 30 + len(data.source.names[0].encode()) + row[1] // 2] ^= 1
        Path(kind).write_bytes(content)
        data = open_labelled_images(Path(kind), model)
        assert data[0, 0][1] and not data[0, 1][1] and data.fingerprint()


def clear_utf8_flags(path):
    """Clear the flag that marks names as UTF-8, as in archives of Info-ZIP's ``zip``."""
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = content.find(signature)
        while place >= 0:
            content[place + flags + 1] &= ~8
            place = content.find(signature, place + 4)
    path.write_bytes(content)


def test_utf8_names_without_flag(files, model):
    whole = open_labelled_images(Path("stored.zip"), model)
    clear_utf8_flags(Path("stored.zip"))
    data = open_labelled_images(Path("stored.zip"), model)
    assert data.source.keys == whole.source.keys and data.fingerprint() == whole.fingerprint()
    assert not data[0, 0][1]


def test_name_in_index_differs_from_header(files):
    """A damaged byte in the central directory gives a member another name."""
    name = min(files).encode()
    content = Path("stored.zip").read_bytes()
    place = content.rindex(name)
    Path("stored.zip").write_bytes(content[:place] + b"3" + content[place + 1 :])
    with pytest.raises(OSError, match="its header names another file"):
        Archive(Path("stored.zip")).open(f"3{min(files)[1:]}")


def test_member_larger_than_archive_is_refused(files):
    content = bytearray(Path("stored.zip").read_bytes())
    place = content.rindex(b"PK\1\2")
    content[place + 20 : place + 28] = b"\xf0" * 8  # the member's compressed and uncompressed size
    Path("stored.zip").write_bytes(content)
    with pytest.raises(UserError, match="stored.zip: is cut off or damaged: .* does not fit"):
        Archive(Path("stored.zip"))


def test_archive_replaced_with_same_size_and_time(files):
    names = set(Archive(Path("data.tar"))._names)
    status = os.stat("data.tar")
    make_tar("other.tar", {f"3{name[1:]}": data for name, data in files.items()})
    os.utime("other.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace("other.tar", "data.tar")
    assert os.stat("data.tar").st_size == status.st_size
    assert not names & set(Archive(Path("data.tar"))._names)


def test_hidden_and_empty_inner_tars_are_not_classes(files, model):
    with tarfile.open("nested.tar", "a") as tar:
        add(tar, "._0.tar", b"no tar")
        add(tar, "9.tar", b"")
    data = open_labelled_images(Path("nested.tar"), model)
    assert data.source.keys == open_labelled_images(Path("data"), model).source.keys


def truncate(path, count):
    content = path.read_bytes()
    path.write_bytes(content[:count])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated_archive_is_refused(files, kind, share):
    truncate(Path(kind), int(Path(kind).stat().st_size * share))
    with pytest.raises(UserError, match=f"{kind}: is (not a readable archive|cut off or damaged)"):
        Archive(Path(kind))


def test_tar_damaged_between_members_is_refused(files):
    """The module tarfile stops at such places without an error."""
    with open("data.tar", "rb") as file:
        _, (start, size, *_) = next(archives._list_tar(Path("data.tar"), file))
    offset = start + -(-size // 512) * 512  # of the header of the second member
    whole = Path("data.tar").read_bytes()
    for damaged in (whole[:offset], whole[:offset] + b"x" * 512 + whole[offset + 512 :], whole + whole):
        Path("data.tar").write_bytes(damaged)
        with pytest.raises(UserError, match="data.tar: is cut off or damaged"):
            Archive(Path("data.tar"))
    inner = Path("nested.tar").read_bytes().replace(b"ustar", b"ustor", 3)
    Path("nested.tar").write_bytes(inner)
    with pytest.raises(UserError, match="nested.tar: is "):
        Archive(Path("nested.tar"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("a.tar.gz", "a.tar.gz: .*decompress it"),
        ("a.parquet", "neither a .zip nor a .tar; docs/data.md"),
        ("a.zip", "a.zip: is not a readable archive"),
        ("a.tar", "a.tar: is not a readable archive"),
        ("lzma.zip", "1/a.png is encrypted, or .* deflate"),
        ("flat.zip", "its 1 images are not in class folders.*docs/data.md"),
        ("flat", "its 1 images are not in class folders.*docs/data.md"),
        ("empty.tar", "holds no images"),
    ],
)
def test_unsupported_files_are_refused(tmp_path, monkeypatch, model, name, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / name
    if name == "lzma.zip":
        make_zip(path, {"1/a.png": b"a"}, zipfile.ZIP_LZMA)
    elif name == "empty.tar":
        make_tar(path, {})
    elif name == "flat.zip":
        make_zip(path, {"a.png": b"a"})
    elif name == "flat":
        make_picture(path / "a.png")
    else:
        path.write_bytes(b"other" * 300)
    with pytest.raises(UserError, match=message):
        open_labelled_images(path, model)


def write_shard(path, rows):
    """Write a Parquet file as the Hugging Face Hub stores ImageNet, or a tar of WebDataset."""
    if path.suffix == ".parquet":
        images = [{"bytes": content, "path": None} for content, _ in rows]
        table = pyarrow.table({"image": images, "label": [label for _, label in rows]})
        pyarrow.parquet.write_table(table, path)
        return
    with tarfile.open(path, "w") as tar:
        for i, (content, label) in enumerate(rows):
            for kind, data in (("jpg", content), ("json", b"{}"), ("cls", b"%d" % label)):
                add(tar, f"train/{i:03d}.{kind}", data)


@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_script_in_docs_converts_shards_to_zip(files, model, suffix):
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    Path("to_zip.py").write_text(script)
    rows = [(data, int(name[0])) for name, data in sorted(files.items())]
    shards = [Path(f"train-{i}{suffix}") for i in range(2)]
    for i, shard in enumerate(shards):
        write_shard(shard, rows[i::2])
    subprocess.run([sys.executable, "to_zip.py", "all.zip", *shards], check=True)
    data = open_labelled_images(Path("all.zip"), model)
    contents = [(data.source.open(i).read(), int(data.all_labels[i])) for i in range(len(data))]
    assert sorted(contents) == sorted(rows)


def test_classes_in_dataset_json(tmp_path, monkeypatch, model):
    """EDM's tools write dataset.json beside folders 00000, 00001, …, which are not classes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    png = io.BytesIO()
    Image.new("L", (32, 32), 10).save(png, "png")
    names = [f"0000{i // 4}/img0000000{i}.png" for i in range(8)]
    images = dict.fromkeys(names, png.getvalue())
    listed = [[name, 7 - i % 3] for i, name in enumerate(names)]

    def open_with_labels(labels, below="", **options):
        whole = {**images, "dataset.json": json.dumps({"labels": labels}).encode()}
        make_zip(tmp_path / "a.zip", {f"{below}{name}": content for name, content in whole.items()})
        return open_labelled_images(tmp_path / "a.zip", model, **options)

    data = open_with_labels(listed)
    assert {key: int(label) for key, label in zip(data.source.keys, data.all_labels)} == dict(listed)
    assert data.classes is None
    assert open_with_labels(listed, "train/").all_labels.tolist() == data.all_labels.tolist()
    for labels, message in (
        (None, "a.zip/dataset.json: does not list one class for each image"),
        ([*listed, listed[0]], "does not list one class for each image"),
        (listed[1:], "dataset.json lists no class for 00000/img00000000.png"),
        ([[name, 10] for name in names], "labels must be in 0 … 9"),
        ([[name, [0.5]] for name in names], "does not list one class for each image"),
    ):
        with pytest.raises(UserError, match=message):
            open_with_labels(labels)
    with pytest.raises(UserError, match="--classes-from: needs class folders"):
        open_with_labels(listed, classes={"00000": 1})
