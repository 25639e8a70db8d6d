"""Published weights through huggingface_hub, against a local server that speaks its protocol."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import ROOT

CONTENT = bytes(range(256)) * 4096
PROGRAM = """
from cca.errors import run_command
from models.hub import WeightsFile
run_command(lambda: print(WeightsFile("{file}", "{repository}").fetch("--weights").read_bytes() == bytes(range(256)) * 4096))
"""


class Hub(BaseHTTPRequestHandler):
    """/REPOSITORY/resolve/REVISION/FILE; ``whole.pth`` is served, ``cut.pth`` breaks off half-way."""

    requests: list[str] = []

    def answer(self, body: bool):
        self.requests.append(f"{self.command} {self.path}")
        name = self.path.rsplit("/", 1)[1]
        if "/resolve/" not in self.path or name not in ("whole.pth", "cut.pth"):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if body:
            self.wfile.write(CONTENT if name == "whole.pth" else CONTENT[: len(CONTENT) // 2])
            self.close_connection = True

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(file, home, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5", **variables}
    program = PROGRAM.format(file=file, repository="FoundationVision/var")
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)


def one_line(result, *parts):
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert len(lines) == 1 and all(part in lines[0] for part in parts), result.stderr


def test_download_then_cache(endpoint, tmp_path):
    assert fetch("whole.pth", tmp_path, HF_ENDPOINT=endpoint).stdout == "True\n"
    assert any(r.startswith("GET /FoundationVision/var/resolve/main/whole.pth") for r in Hub.requests)
    again = fetch("whole.pth", tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert again.stdout == "True\n"


def test_missing_file(endpoint, tmp_path):
    one_line(fetch("none.pth", tmp_path, HF_ENDPOINT=endpoint), "FoundationVision/var/none.pth: the hub has no such file", "--weights PATH")


def test_no_network(tmp_path):
    message = "whole.pth: it is not in the cache and the hub is out of reach; fetch that file by hand"
    one_line(fetch("whole.pth", tmp_path, HF_ENDPOINT="http://127.0.0.1:9"), message)
    one_line(fetch("whole.pth", tmp_path, HF_HUB_OFFLINE="1"), message)


def test_truncated_download(endpoint, tmp_path):
    one_line(fetch("cut.pth", tmp_path, HF_ENDPOINT=endpoint), "FoundationVision/var/cut.pth: the download failed", "--weights PATH")
    assert not [p for p in tmp_path.rglob("cut.pth") if p.exists()]
