"""References by name: downloaded when first used, from a local server here."""

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
    """It serves a reference in the published layout; the current folder holds samples."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    images = bundled(60)["arr_0"]
    np.savez("samples.npz", arr_0=images)
    np.savez("served.npz", arr_0=images, mu=np.zeros(96), sigma=np.eye(96))
    with serving({f"ref/batches/{NAME}": tmp_path / "served.npz"}) as found:
        address = f"{found.endpoint}/ref/batches/resolve/main/{NAME}"
        monkeypatch.setitem(REFERENCES, "imagenet256", PublishedReference(address, 256))
        yield found


def cached(tmp_path):
    return tmp_path / "cache" / "cca-evaluator" / NAME


def test_addresses():
    """As VAR's README gives them."""
    start = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
    assert {name: reference.address for name, reference in REFERENCES.items()} == {
        "imagenet256": f"{start}/256/VIRTUAL_imagenet256_labeled.npz",
        "imagenet512": f"{start}/512/VIRTUAL_imagenet512.npz",
    }


def test_by_name_then_from_the_cache(server, tmp_path):
    """A file of that name in the current folder is not taken for it; its path still is a path."""
    np.savez(NAME, mu=np.ones(96), sigma=np.eye(96))
    reports = []
    for reference in ("imagenet256", "imagenet256", "served.npz", NAME):
        output = f"{len(reports)}.json"
        eval_fid.main([*OPTIONS[:-1], reference, "--output", output])
        reports.append(json.loads(Path(output).read_text()))
    assert sum(request.startswith("GET") for request in server.requests) == 1
    assert reports[0]["reference"]["file"] == str(cached(tmp_path))
    assert reports[0]["metrics"] == reports[1]["metrics"] == reports[2]["metrics"]
    assert reports[3]["metrics"]["fid"] != reports[0]["metrics"]["fid"]
    # A copy is the published one by its content, another file is not by its name.
    names = [report["reference"]["published"] for report in reports]
    assert names == ["imagenet256", "imagenet256", "imagenet256", None]


def test_without_a_cache_no_file_is_known_as_the_published_one(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert published_name(tmp_path) is None


def test_dry_run_tells_of_the_download(server, tmp_path, monkeypatch, capsys):
    """Without a question to the server; the sizes follow from the images and the statistics."""
    eval_fid.main([*OPTIONS, "--dry-run"])
    out = capsys.readouterr().out
    sides = "(256 x 256; the samples are 32 x 32)"
    assert f"reference  {cached(tmp_path)}, to be downloaded {sides}" in out
    assert f"~2.0 GB: {REFERENCES['imagenet256'].address}" in out
    assert not server.requests and not (tmp_path / "cache").exists()
    # 2.0 GB are 0.5 GB where 1.5 GB lie there, and those fit.
    cached(tmp_path).parent.mkdir(parents=True)
    with open(cached(tmp_path).parent / f".{NAME}.part", "wb") as part:
        part.truncate(1_500_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9, used=0, total=10**9))
    eval_fid.main(OPTIONS)
    out = capsys.readouterr().out
    assert f"~532 MB: {REFERENCES['imagenet256'].address}" in out


def test_several_processes_download_once(server, tmp_path):
    address = REFERENCES["imagenet256"].address
    (tmp_path / "command.py").write_text(COMMAND.format(root=str(ROOT), address=address))
    command = [tmp_path / "command.py", *OPTIONS[:3], tmp_path / "samples.npz", *OPTIONS[4:]]
    assert f"60 samples against {NAME}" in run(*command, processes=2).stdout
    assert sum(request.startswith("GET") for request in server.requests) == 1


def test_what_is_damaged_is_not_taken(server, tmp_path):
    """Neither a download whose checksums are wrong, nor what became of one on the disk."""
    whole = (tmp_path / "served.npz").read_bytes()
    (tmp_path / "served.npz").write_bytes(whole.replace(b"NUMPY", b"numpy", 1))
    with pytest.raises(UserError, match="--reference: .* damaged"):
        eval_fid.main(OPTIONS)
    assert not cached(tmp_path).exists()
    cached(tmp_path).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{NAME} is damaged; delete it to have it downloaded again"):
        eval_fid.main(OPTIONS)


def test_a_folder_of_that_name(server, tmp_path):
    """It was a path before it was a name: which is meant must be said."""
    (tmp_path / "imagenet256").mkdir()
    with pytest.raises(UserError, match=r"--reference: imagenet256 is the name of .* write ./imagenet256"):
        eval_fid.main(OPTIONS)
    with pytest.raises(UserError, match="imagenet256: holds no images"):
        eval_fid.main([*OPTIONS[:-1], "./imagenet256"])
    assert not server.requests
