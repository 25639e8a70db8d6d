"""Published weights through huggingface_hub, and files of any address, against a local server."""

import json
import time
from pathlib import Path

import pytest
from commands import ROOT, call
from hub_server import hub_variables, serving
from huggingface_hub import constants

from models.utils.errors import UserError
from models.zoo.checkpoint_formats import weights_sha256
from models.zoo.hub import download, part_of
from models.zoo.loading import find_files

FILES = (ROOT / "tests" / "golden" / "published_files.txt").read_text().split()
EVERYTHING = """
from models.__main__ import main
from models.zoo.loading import find_files
from models import ZOO
for name, entry in ZOO.items():
    for weights, sizes in (("base", entry.base), ("cca", entry.cca)):
        for size, file in sizes.items():
            if file and file.repository:
                print(find_files(name, weights, image_size=size).fetch().transformer_file.path.read_text())
print(find_files("llamagen-b", None, "vq_ds8_c2i").fetch().tokenizer_file.path.read_text())
main([])
"""


def url(file: str) -> str:
    """Where the hub has "OWNER/REPOSITORY/FILE"."""
    owner, repository, name = file.split("/", 2)
    return f"{owner}/{repository}/resolve/main/{name}"


@pytest.fixture
def hub(tmp_path):
    """A hub with all published files, each of which holds its own name."""
    served = {}
    for number, file in enumerate(FILES):
        served[file] = tmp_path / f"served-{number}"
        served[file].write_text(file)
    with serving(served) as server:
        yield server


def python(arguments, tmp_path, endpoint, offline=False):
    return call(arguments, **hub_variables(tmp_path / "home", endpoint, offline))


def sample(tmp_path, endpoint, *options, offline=False):
    """Few images, as any disk has room for."""
    arguments = ["--num-samples", 8, *options, "--output", tmp_path / "out" / "samples.npz"]
    return python(["sample.py", *arguments], tmp_path, endpoint, offline)


def one_line(result, tmp_path, *parts, alone=True):
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ") or alone]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert len(lines) == 1 and all(part in lines[0] for part in parts), result.stderr
    assert not (tmp_path / "out").exists()


def test_every_published_file_by_name_then_from_the_cache(hub, tmp_path):
    """All are asked for under their names, once each; the two usual tokenizers come along unprinted."""
    first = python(["-c", EVERYTHING], tmp_path, hub.endpoint)
    assert first.returncode == 0, first.stderr
    assert sorted(r for r in hub.requests if "/resolve/" in r and r.startswith("GET")) == sorted(
        f"GET /{url(f)}" for f in FILES
    )
    found, _, table = first.stdout.partition("model ")
    assert set(FILES) - set(found.split()) == {
        "FoundationVision/var/vae_ch160v4096z32.pth",
        "FoundationVision/LlamaGen/vq_ds16_c2i.pt",
    }
    table = table.partition("FID-50k")[0]
    assert "cached" in table and "hub, ~" not in table
    offline = python(["-c", EVERYTHING], tmp_path, "http://127.0.0.1:9", offline=True)
    assert offline.stdout == first.stdout


def test_files_of_any_repository(hub, tmp_path):
    """By address, at a revision, for both options; the hash of what was sampled is noted."""
    for part in ("", "-tokenizer"):
        hub.files[f"me/my-cca/runs/7/var{part}.safetensors"] = ROOT / f"assets/var-mini{part}.safetensors"
    options = ["--model", "var-mini", "--weights", "hf://me/my-cca/runs/7/var.safetensors@v1.0"]
    options += ["--tokenizer-weights", "hf://me/my-cca/runs/7/var-tokenizer.safetensors"]
    assert "var.safetensors@v1.0, to be downloaded" in sample(tmp_path, hub.endpoint, *options).stdout
    assert "is finished already" in sample(tmp_path, hub.endpoint, *options, offline=True).stdout
    assert hub.requests.count("GET /me/my-cca/resolve/v1.0/runs/7/var.safetensors") == 1
    described = json.loads((tmp_path / "out" / "samples.json").read_text())["options"]
    assert described["weights_sha256"] == weights_sha256(ROOT / "assets/var-mini.safetensors")


@pytest.mark.parametrize(
    "address", ["hf://me/my-cca", "hf://me/my--cca/none.pt", "hf://me/my-cca//etc/passwd", "hf://me/a/../b"]
)
def test_other_addresses(address):
    with pytest.raises(UserError, match="^--weights: .* is not hf://ORG/REPO/FILE"):
        find_files("var-mini", address)


def test_an_address_without_a_file(hub, tmp_path):
    result = sample(tmp_path, hub.endpoint, "--weights", "hf://me/my-cca/none.pt@v2", "--model", "var-mini")
    one_line(result, tmp_path, "me/my-cca/none.pt@v2: the hub has no such file")


def test_missing_file(hub, tmp_path):
    hub.files.clear()
    result = sample(tmp_path, hub.endpoint, "--model", "var-d16", "--weights", "cca")
    one_line(
        result,
        tmp_path,
        "--weights: ChenDRAG/CCA_VAR/CCA_VAR_Guidance_Free/VAR_d16_CCA.pth: the hub has no such file",
        "--weights PATH",
    )


@pytest.mark.parametrize("offline", [False, True])
def test_no_network(tmp_path, offline):
    result = sample(tmp_path, "http://127.0.0.1:9", "--model", "llamagen-b", offline=offline)
    message = (
        "FoundationVision/LlamaGen/c2i_B_384.pt: it is not in the cache and the hub is out of reach; "
        "download the file by hand"
    )
    one_line(result, tmp_path, "--weights: ", message)


@pytest.mark.parametrize(
    "status, token, message",
    [
        (401, "hf_old", "the hub refuses your token (HF_TOKEN, or that of `hf auth login`)"),
        (403, "hf_old", "the hub refuses your token (HF_TOKEN, or that of `hf auth login`)"),
        (401, "", "the hub is out of reach"),
        (429, "", "the rate limit is reached (429 Too Many Requests)"),
        (429, "hf_good", "the rate limit is reached (429 Too Many Requests)"),
        (500, "hf_good", "the hub is out of reach"),
        (-403, "hf_old", "the hub refuses your token"),
        (-401, "", "needs a login"),
    ],
)
def test_a_hub_that_refuses(status, token, message, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.refusal, hub.is_gated = abs(status), status < 0
    result = sample(tmp_path, hub.endpoint, "--model", "llamagen-b")
    one_line(
        result, tmp_path, "--weights: FoundationVision/LlamaGen/c2i_B_384.pt: ", message, "--weights PATH"
    )
    assert "hf_" not in result.stderr.replace("hf_hub", "")  # the token itself is told nobody


def test_a_hub_that_ends_after_its_first_answer(hub, tmp_path):
    """The client then says that the file is not in its cache; the hub has it all the same."""
    hub.refusal, hub.answers = 400, 1  # of 503 the client would ask again for half a minute
    result = sample(tmp_path, hub.endpoint, "--model", "llamagen-b")
    one_line(result, tmp_path, "--weights: FoundationVision/LlamaGen/c2i_B_384.pt: the download failed")


def test_truncated_download(hub, tmp_path):
    hub.cut = True
    result = sample(tmp_path, hub.endpoint, "--model", "var-mini", "--tokenizer-weights", "vae_ch160v4096z32")
    # huggingface_hub tells of its tries to resume before it gives up.
    one_line(
        result,
        tmp_path,
        "--tokenizer-weights: FoundationVision/var/vae_ch160v4096z32.pth: the download failed",
        "--tokenizer-weights PATH",
        alone=False,
    )
    assert not [p for p in (tmp_path / "home").rglob("vae_ch160v4096z32.pth") if p.exists()]


def test_damaged_file_in_the_cache(hub, tmp_path):
    """The message names the one file to delete; deleted, it is downloaded again."""
    broken = sample(tmp_path, hub.endpoint, "--model", "var-d20")
    one_line(broken, tmp_path, "var_d20.pth: not a weights file", "to have it downloaded again", alone=False)
    Path(broken.stderr.rpartition("; delete ")[2].partition(" to have")[0]).unlink()
    sample(tmp_path, hub.endpoint, "--model", "var-d20")
    assert hub.requests.count(f"GET /{url('FoundationVision/var/var_d20.pth')}") == 2


CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def server(tmp_path, monkeypatch):
    """One that serves a file; the client reads it in small pieces and does not wait between its tries."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "served").write_bytes(CONTENT)
    with serving({"some/where/FILE.npz": tmp_path / "served"}) as found:
        found.ranges = True
        yield found


def ask(server, tmp_path):
    address = f"{server.endpoint}/some/where/resolve/main/FILE.npz"
    path = tmp_path / "cache" / "FILE.npz"
    return download(address, path, lambda part: part.read_bytes() == CONTENT, "--file")


def refused(server, tmp_path, message):
    with pytest.raises(UserError, match=f"^--file: {server.endpoint}/some/where/[^\n]*{message}[^\n]*$"):
        ask(server, tmp_path)
    assert not (tmp_path / "cache" / "FILE.npz").exists()


def left(tmp_path):
    return [path.stat().st_size for path in (tmp_path / "cache").glob(".*.part")]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_was_cut_off_is_resumed(ranges, server, tmp_path):
    """The part that came before is not asked for again, of a server that sends parts."""
    server.cut = True
    refused(server, tmp_path, "cut off after .* bytes .* resume")
    (had,) = left(tmp_path)
    server.cut, server.ranges, server.sent = False, ranges, []
    assert 0 < had < len(CONTENT)
    assert ask(server, tmp_path).read_bytes() == CONTENT and not left(tmp_path)
    assert server.sent == [0, had if ranges else 0]  # the question for its size, then the rest


def test_a_part_that_is_whole(server, tmp_path):
    """As a process leaves it that was killed before the rename: it is not asked for again."""
    (tmp_path / "cache").mkdir()
    part_of(tmp_path / "cache" / "FILE.npz").write_bytes(CONTENT)
    assert ask(server, tmp_path).read_bytes() == CONTENT and not left(tmp_path)
    assert [request.split()[0] for request in server.requests] == ["HEAD"]


@pytest.mark.parametrize("other", [CONTENT[::-1], CONTENT[:100]], ids=["other", "shorter"])
def test_another_content_is_removed(other, server, tmp_path):
    """Also where the file changed after a part of it had come: that part is not taken for the new one's."""
    server.cut = True
    refused(server, tmp_path, "cut off")
    server.cut = False
    (tmp_path / "served").write_bytes(other)
    refused(server, tmp_path, "is damaged and was removed")
    assert not left(tmp_path)


def test_out_of_reach(server, tmp_path, monkeypatch):
    """Nothing is made on the disk; the line says what to fetch and where to put it."""
    by_hand = rf"; .* by hand .* {tmp_path}/cache/FILE\.npz"
    server.refusal = 429
    refused(server, tmp_path, rf"is out of reach \(the rate limit is reached .*\){by_hand}")
    server.refusal = None
    server.files.clear()
    refused(server, tmp_path, rf"is out of reach \(.*404.*\){by_hand}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(server, tmp_path, rf"is out of reach \(.*offline.*\){by_hand}")
    monkeypatch.undo()
    server.server_close()
    refused(server, tmp_path, rf"is out of reach \(.*\){by_hand}")
    assert not (tmp_path / "cache").exists()
