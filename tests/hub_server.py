"""A local server that speaks enough of the Hugging Face hub's protocol for real huggingface_hub calls."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789" * 4


class Handler(BaseHTTPRequestHandler):
    """/REPOSITORY/resolve/REVISION/FILE: HEAD tells size, commit and ETag, GET sends the file."""

    protocol_version = "HTTP/1.1"

    def answer(self, body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        repository, _, rest = self.path[1:].partition("/resolve/")
        content = self.server.files.get(f"{repository}/{rest.partition('/')[2]}")
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = content.stat().st_size
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(str(content).encode()).hexdigest()}"')
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if body:
            with open(content, "rb") as file:
                left = size // 2 if self.server.cut else size
                while left and (chunk := file.read(min(left, 2**20))):
                    self.wfile.write(chunk)
                    left -= len(chunk)
            self.close_connection = self.server.cut

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, *_) -> None:
        pass


class Hub(ThreadingHTTPServer):
    """``files`` maps "OWNER/REPOSITORY/FILE" to what it serves; ``cut`` breaks downloads off half-way."""

    daemon_threads = True

    def __init__(self, files: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.requests = files, False, []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(files: dict[str, Path]):
    hub = Hub(files)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def hub_variables(home: Path, endpoint: str, offline: bool = False) -> dict[str, str]:
    """Environment variables of a user of that hub, with the cache under ``home``."""
    names = ("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_DOWNLOAD_TIMEOUT")
    return dict(zip(names, (str(home), endpoint, str(int(offline)), "1", "5")))
