"""Files at public addresses, against a local server: cut off, resumed, changed, without ranges, damaged."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hub_server import serving

from models.downloads import fetch
from models.errors import UserError
from models.plan import Download, require_space, show_plan

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def server(tmp_path, monkeypatch):
    """One that serves a file; the client reads it in small pieces and does not wait between its tries."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "served").write_bytes(CONTENT)
    with serving({"some/where/FILE.npz": tmp_path / "served"}) as found:
        found.ranges = True
        yield found


def address(server):
    return f"{server.endpoint}/some/where/resolve/main/FILE.npz"


def ask(server, tmp_path, is_whole=lambda part: part.read_bytes() == CONTENT):
    return fetch(address(server), tmp_path / "cache" / "FILE.npz", is_whole, "--file")


def refused(server, tmp_path, *parts, **how):
    with pytest.raises(UserError) as error:
        ask(server, tmp_path, **how)
    assert all(part in str(error.value) for part in ("--file: ", *parts)) and "\n" not in str(error.value)
    assert not (tmp_path / "cache" / "FILE.npz").exists()


def left(tmp_path):
    return [path.stat().st_size for path in (tmp_path / "cache").glob(".*.part")]


def test_downloaded_once(server, tmp_path):
    path = ask(server, tmp_path)
    assert path == tmp_path / "cache" / "FILE.npz" and path.read_bytes() == CONTENT and not left(tmp_path)
    asked = list(server.requests)
    assert ask(server, tmp_path) == path and server.requests == asked


def test_cut_off_and_gone_on_with(server, tmp_path):
    """The part that came before is not asked for again."""
    server.cut = True
    refused(server, tmp_path, address(server), "cut off after ", "of 256,000 bytes", "goes on from there")
    (had,) = left(tmp_path)
    server.cut, server.sent = False, []
    assert 0 < had < len(CONTENT)
    assert ask(server, tmp_path).read_bytes() == CONTENT and not left(tmp_path)
    assert server.sent == [0, had]  # the question for its size, then the rest


def test_killed_before_the_rename(server, tmp_path, monkeypatch):
    """All bytes are there: none is asked for again."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(server, tmp_path)
    assert left(tmp_path) == [len(CONTENT)]
    server.requests.clear()
    assert ask(server, tmp_path).read_bytes() == CONTENT and not left(tmp_path)
    assert [request.split()[0] for request in server.requests] == ["HEAD"]


def test_a_server_without_ranges_begins_anew(server, tmp_path):
    server.cut = True
    refused(server, tmp_path, "cut off")
    server.cut, server.ranges, server.sent = False, False, []
    assert left(tmp_path)
    assert ask(server, tmp_path).read_bytes() == CONTENT
    assert server.sent == [0, 0]


def test_a_server_without_ranges_that_always_cuts_off(server, tmp_path):
    """It is given up, though every try gets some bytes."""
    server.cut, server.ranges = True, False
    refused(server, tmp_path, "cut off after ", "the server cannot resume, and never sent all")
    assert len(server.requests) < 10


def test_a_file_that_changed_in_between_begins_anew(server, tmp_path):
    """Its old part is not joined to the new rest."""
    server.cut = True
    refused(server, tmp_path, "cut off")
    server.cut, server.sent = False, []
    (tmp_path / "served").write_bytes(CONTENT[::-1])
    path = ask(server, tmp_path, is_whole=lambda part: True)
    assert path.read_bytes() == CONTENT[::-1] and server.sent == [0, 0] and not left(tmp_path)


def test_wrong_length(server, tmp_path):
    """Fewer bytes than announced are not taken for the file; they are gone on with."""
    server.promised = 100
    refused(server, tmp_path, "cut off after 256,000 of 256,100 bytes")
    assert left(tmp_path) == [len(CONTENT)]


def test_another_content_is_removed(server, tmp_path):
    refused(server, tmp_path, "is damaged, or another file", is_whole=lambda part: False)
    assert not left(tmp_path)


def test_out_of_reach(server, tmp_path):
    """Nothing is made on the disk; the line says what to fetch and where to put it."""
    gone = "http://127.0.0.1:9/some/FILE.npz"
    with pytest.raises(UserError) as error:
        fetch(gone, tmp_path / "cache" / "FILE.npz", lambda part: True, "--file")
    message = str(error.value)
    assert message.startswith(f"--file: {gone} is out of reach (")
    assert message.endswith(f"); fetch it by hand and put it at {tmp_path / 'cache' / 'FILE.npz'}")
    server.files.clear()
    refused(server, tmp_path, "the server answers with status 404; fetch it by hand and put it at ")
    assert not (tmp_path / "cache").exists()


def test_no_space(server, tmp_path, monkeypatch):
    monkeypatch.setattr("models.plan._free", lambda _: 1000)
    refused(server, tmp_path, address(server), "is to be downloaded (~256 kB)", "has 1 kB free")


def test_no_place(tmp_path, capsys):
    """Said in the plan, and before another file is downloaded."""
    (tmp_path / "cache").write_text("a file")
    files = [Download("some", 10, tmp_path, "--a"), Download("other", 10, tmp_path / "cache" / "x", "--b")]
    show_plan({"model": "m"}, files)
    assert f"{tmp_path / 'cache'} is no folder that may be written to" in capsys.readouterr().out
    with pytest.raises(UserError, match="--b: other is to be downloaded, .*cache is no folder that may"):
        require_space(files)


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        ask(server, tmp_path)


def test_several_at_once_download_once(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ask(server, tmp_path), range(4)))
    assert found == 4 * [tmp_path / "cache" / "FILE.npz"] and found[0].read_bytes() == CONTENT
    assert sum(request.startswith("GET") for request in server.requests) == 1
