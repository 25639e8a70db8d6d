"""Downloads from a local server: weights through huggingface_hub, and files of any address."""

import json
import time
from pathlib import Path

import pytest
from commands import ROOT, call
from hub_server import hub_variables, serving
from huggingface_hub import constants

from models.utils.errors import UserError, one_line
from models.zoo.checkpoint_formats import weights_sha256
from models.zoo.hub import download, part_of
from models.zoo.loading import find_files, load_model

FILES = (ROOT / "tests" / "golden" / "published_files.txt").read_text().split()
EVERYTHING = """
from models.__main__ import main
from models.zoo.loading import find_files, load_model
from models import ZOO
for name, entry in ZOO.items():
    for weights, sizes in (("base", entry.base), ("cca", entry.cca)):
        for size, file in sizes.items():
            if file and file.repository:
                print(find_files(name, weights, image_size=size).fetch().transformer_file.path.read_text())
print(find_files("llamagen-b", None, "vq_ds8_c2i").fetch().tokenizer_file.path.read_text())
main([])
"""


def hub_path(file: str) -> str:
    """Return the path at which the hub serves "OWNER/REPOSITORY/FILE"."""
    owner, repository, name = file.split("/", 2)
    return f"{owner}/{repository}/resolve/main/{name}"


@pytest.fixture
def hub(tmp_path):
    """Run a hub that serves all published files. The content of each file is its name."""
    served = {}
    for number, file in enumerate(FILES):
        served[file] = tmp_path / f"served-{number}"
        served[file].write_text(file)
    with serving(served) as server:
        yield server


@pytest.fixture
def use_hub(hub, tmp_path, monkeypatch):
    """Make huggingface_hub use the server and an empty cache in this process."""
    address = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))


def run_python(arguments, tmp_path, endpoint, offline=False):
    return call(arguments, **hub_variables(tmp_path / "home", endpoint, offline))


def run_sample(tmp_path, endpoint, *options, offline=False):
    """Run sample.py for a few images, which fit on any disk, and return its result."""
    arguments = ["--num-samples", 8, *options, "--output", tmp_path / "out" / "samples.npz"]
    return run_python(["sample.py", *arguments], tmp_path, endpoint, offline)


def expect_one_line(result, tmp_path, *parts, alone=True):
    """Assert that sample.py failed with one error line, which contains all ``parts``, and wrote no output.

    alone: stderr must have no other line.
    """
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ") or alone]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert len(lines) == 1 and all(part in lines[0] for part in parts), result.stderr
    assert not (tmp_path / "out").exists()


def test_published_files_are_downloaded_once(hub, tmp_path):
    """All files are requested once each, and a second run finds them in the cache.

    The script downloads the two default tokenizers as well, but does not print them.
    """
    first = run_python(["-c", EVERYTHING], tmp_path, hub.endpoint)
    assert first.returncode == 0, first.stderr
    assert sorted(r for r in hub.requests if "/resolve/" in r and r.startswith("GET")) == sorted(
        f"GET /{hub_path(f)}" for f in FILES
    )
    printed, _, table = first.stdout.partition("model ")
    assert set(FILES) - set(printed.split()) == {
        "FoundationVision/var/vae_ch160v4096z32.pth",
        "FoundationVision/LlamaGen/vq_ds16_c2i.pt",
    }
    table = table.partition("FID-50k")[0]
    assert "cached" in table and "hub, ~" not in table
    offline = run_python(["-c", EVERYTHING], tmp_path, "http://127.0.0.1:9", offline=True)
    assert offline.stdout == first.stdout


def test_files_of_any_repository(hub, tmp_path):
    """Both options take hub addresses. The record of the samples has the hash of the weights."""
    for part in ("", "-tokenizer"):
        hub.files[f"me/my-cca/runs/7/var{part}.safetensors"] = ROOT / f"assets/var-mini{part}.safetensors"
    options = ["--model", "var-mini", "--weights", "hf://me/my-cca/runs/7/var.safetensors@v1.0"]
    options += ["--tokenizer-weights", "hf://me/my-cca/runs/7/var-tokenizer.safetensors"]
    assert "var.safetensors@v1.0, to be downloaded" in run_sample(tmp_path, hub.endpoint, *options).stdout
    assert "is finished already" in run_sample(tmp_path, hub.endpoint, *options, offline=True).stdout
    assert hub.requests.count("GET /me/my-cca/resolve/v1.0/runs/7/var.safetensors") == 1
    record = json.loads((tmp_path / "out" / "samples.json").read_text())["options"]
    assert record["weights_sha256"] == weights_sha256(ROOT / "assets/var-mini.safetensors")


@pytest.mark.parametrize(
    "address", ["hf://me/my-cca", "hf://me/my--cca/none.pt", "hf://me/my-cca//etc/passwd", "hf://me/a/../b"]
)
def test_invalid_addresses(address):
    with pytest.raises(UserError, match="^--weights: .* is not hf://ORG/REPO/FILE"):
        find_files("var-mini", address)


def test_missing_file_at_an_address(hub, tmp_path):
    result = run_sample(
        tmp_path, hub.endpoint, "--weights", "hf://me/my-cca/none.pt@v2", "--model", "var-mini"
    )
    expect_one_line(result, tmp_path, "me/my-cca/none.pt@v2: the hub has no such file")


def test_missing_published_file(hub, tmp_path):
    hub.files.clear()
    result = run_sample(tmp_path, hub.endpoint, "--model", "var-d16", "--weights", "cca")
    expect_one_line(
        result,
        tmp_path,
        "--weights: ChenDRAG/CCA_VAR/CCA_VAR_Guidance_Free/VAR_d16_CCA.pth: the hub has no such file",
        "--weights PATH",
    )


@pytest.mark.parametrize("offline", [False, True])
def test_no_network(tmp_path, offline):
    result = run_sample(tmp_path, "http://127.0.0.1:9", "--model", "llamagen-b", offline=offline)
    message = (
        "FoundationVision/LlamaGen/c2i_B_384.pt: it is not in the cache and the hub is out of reach; "
        "download the file by hand"
    )
    expect_one_line(result, tmp_path, "--weights: ", message)


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
def test_refusals_of_the_hub(status, token, message, hub, use_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.refusal, hub.is_gated = abs(status), status < 0
    with pytest.raises(UserError) as caught:
        find_files("llamagen-b").fetch()
    text = one_line(caught.value)
    assert text.startswith("--weights: FoundationVision/LlamaGen/c2i_B_384.pt: ") and message in text
    assert text.endswith("--weights PATH") and "hf_" not in text  # the token is not printed


def test_hub_fails_after_its_first_answer(hub, use_hub):
    """huggingface_hub then reports that the file is not in its cache, although the hub has it."""
    hub.refusal, hub.answers = 400, 1  # after a 503 the client would retry for half a minute
    with pytest.raises(UserError, match="--weights: .*/c2i_B_384.pt: the download failed"):
        find_files("llamagen-b").fetch()


def test_truncated_download(hub, tmp_path):
    hub.cut = True
    result = run_sample(
        tmp_path, hub.endpoint, "--model", "var-mini", "--tokenizer-weights", "vae_ch160v4096z32"
    )
    # huggingface_hub logs its attempts to resume before it gives up.
    expect_one_line(
        result,
        tmp_path,
        "--tokenizer-weights: FoundationVision/var/vae_ch160v4096z32.pth: the download failed",
        "--tokenizer-weights PATH",
        alone=False,
    )
    assert not [p for p in (tmp_path / "home").rglob("vae_ch160v4096z32.pth") if p.exists()]


def test_damaged_file_in_cache(hub, use_hub):
    """The message names the file to delete. It is then downloaded again."""
    for attempt in (1, 2):
        with pytest.raises(UserError, match="var_d20.pth: not a weights file.* to have it down") as caught:
            load_model("var-d20")
        Path(str(caught.value).rpartition("; delete ")[2].partition(" to have")[0]).unlink()
        requests = hub.requests.count(f"GET /{hub_path('FoundationVision/var/var_d20.pth')}")
        assert requests == attempt


CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Run a server of one file. The client reads small pieces and does not wait between retries."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "served").write_bytes(CONTENT)
    with serving({"some/where/FILE.npz": tmp_path / "served"}) as file_server:
        file_server.ranges = True
        yield file_server


def download_file(server, tmp_path):
    address = f"{server.endpoint}/some/where/resolve/main/FILE.npz"
    path = tmp_path / "cache" / "FILE.npz"
    return download(address, path, lambda part: part.read_bytes() == CONTENT, "--file")


def expect_failure(server, tmp_path, message):
    """Assert that the download fails with this message (a regular expression) and writes no file."""
    with pytest.raises(UserError, match=f"^--file: {server.endpoint}/some/where/[^\n]*{message}[^\n]*$"):
        download_file(server, tmp_path)
    assert not (tmp_path / "cache" / "FILE.npz").exists()


def part_sizes(tmp_path):
    """Return the sizes of unfinished downloads, in bytes."""
    return [path.stat().st_size for path in (tmp_path / "cache").glob(".*.part")]


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_resumes(ranges, server, tmp_path):
    """A server that supports range requests sends only the rest. Other servers send the whole file again."""
    server.cut = True
    expect_failure(server, tmp_path, "cut off after .* bytes .* resume")
    (stored,) = part_sizes(tmp_path)
    server.cut, server.ranges, server.sent = False, ranges, []
    assert 0 < stored < len(CONTENT)
    assert download_file(server, tmp_path).read_bytes() == CONTENT and not part_sizes(tmp_path)
    assert server.sent == [0, stored if ranges else 0]  # the request for the size, then the rest


def test_complete_part_is_not_requested(server, tmp_path):
    """A process that is killed before it renames the file leaves a complete part."""
    (tmp_path / "cache").mkdir()
    part_of(tmp_path / "cache" / "FILE.npz").write_bytes(CONTENT)
    assert download_file(server, tmp_path).read_bytes() == CONTENT and not part_sizes(tmp_path)
    assert [request.split()[0] for request in server.requests] == ["HEAD"]


@pytest.mark.parametrize("other", [CONTENT[::-1], CONTENT[:100]], ids=["other", "shorter"])
def test_changed_content_is_removed(other, server, tmp_path):
    """The file on the server changes after a part of it was downloaded."""
    server.cut = True
    expect_failure(server, tmp_path, "cut off")
    server.cut = False
    (tmp_path / "served").write_bytes(other)
    expect_failure(server, tmp_path, "is damaged and was removed")
    assert not part_sizes(tmp_path)


def test_server_out_of_reach(server, tmp_path, monkeypatch):
    """The message says what to download by hand and where to put it. Nothing is written to disk."""
    by_hand = rf"; .* by hand .* {tmp_path}/cache/FILE\.npz"
    server.refusal = 429
    expect_failure(server, tmp_path, rf"is out of reach \(the rate limit is reached .*\){by_hand}")
    server.refusal = None
    server.files.clear()
    expect_failure(server, tmp_path, rf"is out of reach \(.*404.*\){by_hand}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expect_failure(server, tmp_path, rf"is out of reach \(.*offline.*\){by_hand}")
    monkeypatch.undo()
    server.server_close()
    expect_failure(server, tmp_path, rf"is out of reach \(.*\){by_hand}")
    assert not (tmp_path / "cache").exists()
