"""Published references by name: they are downloaded at the first use (here from a local server)."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import ROOT, run
from hub_server import serving
from made_data import bundled

import eval_fid
from cca.evaluation.references import REFERENCES, PublishedReference, published_name
from models.utils.errors import UserError

NAME = "VIRTUAL_imagenet256_labeled.npz"
COMMAND = """
import sys
sys.path.insert(0, {root!r})
import eval_fid
from cca.evaluation.references import REFERENCES, PublishedReference
from cca.cli.main import run_command
REFERENCES["imagenet256"] = PublishedReference({address!r}, 256)
run_command(eval_fid.main)
"""
OPTIONS = ["--features", "mini", "--samples", "samples.npz", "--reference", "imagenet256"]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a reference in the published layout, and write samples to the current folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    images = bundled(60)["arr_0"]
    np.savez("samples.npz", arr_0=images)
    np.savez("served.npz", arr_0=images, mu=np.zeros(96), sigma=np.eye(96))
    with serving({f"ref/batches/{NAME}": tmp_path / "served.npz"}) as hub:
        address = f"{hub.endpoint}/ref/batches/resolve/main/{NAME}"
        monkeypatch.setitem(REFERENCES, "imagenet256", PublishedReference(address, 256))
        yield hub


def cached_path(tmp_path):
    return tmp_path / "cache" / "cca-evaluator" / NAME


def test_addresses():
    """The addresses are those in VAR's README."""
    start = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
    assert {name: reference.address for name, reference in REFERENCES.items()} == {
        "imagenet256": f"{start}/256/VIRTUAL_imagenet256_labeled.npz",
        "imagenet512": f"{start}/512/VIRTUAL_imagenet512.npz",
    }


def test_reference_is_downloaded_then_cached(server, tmp_path):
    """A file with the name of the download in the current folder is read only if its path is given."""
    np.savez(NAME, mu=np.ones(96), sigma=np.eye(96))
    reports = []
    for reference in ("imagenet256", "imagenet256", "served.npz", NAME):
        output = f"{len(reports)}.json"
        eval_fid.main([*OPTIONS[:-1], reference, "--output", output])
        reports.append(json.loads(Path(output).read_text()))
    assert sum(request.startswith("GET") for request in server.requests) == 1
    assert reports[0]["reference"]["file"] == str(cached_path(tmp_path))
    assert reports[0]["metrics"] == reports[1]["metrics"] == reports[2]["metrics"]
    assert reports[3]["metrics"]["fid"] != reports[0]["metrics"]["fid"]
    # A copy counts as the published reference by its content; a file does not count by its name.
    names = [report["reference"]["published"] for report in reports]
    assert names == ["imagenet256", "imagenet256", "imagenet256", None]


def test_no_published_name_without_a_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert published_name(tmp_path) is None


def test_plan_shows_the_download(server, tmp_path, monkeypatch, capsys):
    """The plan sends no request to the server: it computes the size from the images and the statistics."""
    eval_fid.main([*OPTIONS, "--dry-run"])
    out = capsys.readouterr().out
    resolutions = "(256 x 256; the samples are 32 x 32)"
    assert f"reference  {cached_path(tmp_path)}, to be downloaded {resolutions}" in out
    assert f"~2.0 GB: {REFERENCES['imagenet256'].address}" in out
    assert not server.requests and not (tmp_path / "cache").exists()
    # If 1.5 of 2.0 GB are downloaded already, the other 0.5 GB fit on the disk.
    cached_path(tmp_path).parent.mkdir(parents=True)
    with open(cached_path(tmp_path).parent / f".{NAME}.part", "wb") as part:
        part.truncate(1_500_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9, used=0, total=10**9))
    eval_fid.main(OPTIONS)
    out = capsys.readouterr().out
    assert f"~532 MB: {REFERENCES['imagenet256'].address}" in out


def test_two_ranks_download_once(server, tmp_path):
    address = REFERENCES["imagenet256"].address
    (tmp_path / "command.py").write_text(COMMAND.format(root=str(ROOT), address=address))
    command = [tmp_path / "command.py", *OPTIONS[:3], tmp_path / "samples.npz", *OPTIONS[4:]]
    assert f"60 samples against {NAME}" in run(*command, processes=2).stdout
    assert sum(request.startswith("GET") for request in server.requests) == 1


def test_damaged_reference_is_refused(server, tmp_path):
    """Both a download with wrong checksums and a damaged file in the cache are refused."""
    whole = (tmp_path / "served.npz").read_bytes()
    (tmp_path / "served.npz").write_bytes(whole.replace(b"NUMPY", b"numpy", 1))
    with pytest.raises(UserError, match="--reference: .* damaged"):
        eval_fid.main(OPTIONS)
    assert not cached_path(tmp_path).exists()
    cached_path(tmp_path).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{NAME} is damaged; delete it to have it downloaded again"):
        eval_fid.main(OPTIONS)


def test_folder_with_the_name_of_a_reference(server, tmp_path):
    """The name alone is ambiguous and is refused; ``./NAME`` is the folder."""
    (tmp_path / "imagenet256").mkdir()
    with pytest.raises(UserError, match=r"--reference: imagenet256 is the name of .* write ./imagenet256"):
        eval_fid.main(OPTIONS)
    with pytest.raises(UserError, match="imagenet256: holds no images"):
        eval_fid.main([*OPTIONS[:-1], "./imagenet256"])
    assert not server.requests
