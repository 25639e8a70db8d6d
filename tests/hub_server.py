"""Local server with the part of the Hugging Face hub's protocol that huggingface_hub needs.

With ``Hub.ranges`` it also answers range requests, as servers of plain files do.
"""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789" * 4


class Handler(BaseHTTPRequestHandler):
    """Handler of /REPOSITORY/resolve/REVISION/FILE. HEAD returns size, commit and ETag, GET also the file."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        repository, _, rest = self.path[1:].partition("/resolve/")
        content = self.server.files.get(f"{repository}/{rest.partition('/')[2]}")
        files = sum("/resolve/" in request for request in self.server.requests)
        if self.server.refusal and files > self.server.answers:
            self.send_response(self.server.refusal)
            if self.server.is_gated:
                self.send_header("X-Error-Code", "GatedRepo")
            elif self.server.refusal == 401 and "Authorization" in self.headers:
                self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, start = content.read_bytes(), 0
        etag = f'"{hashlib.sha256(data + str(content).encode()).hexdigest()}"'
        asked = self.headers.get("Range")
        if asked and self.server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.server.sent.append(start)
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            end = (start + len(data)) // 2 if self.server.cut else len(data)
            self.wfile.write(data[start:end])
            self.close_connection = self.server.cut

    do_HEAD = do_GET = answer

    def log_message(self, *_) -> None:
        pass


class Hub(ThreadingHTTPServer):
    """Server of ``files``, a dict from "OWNER/REPOSITORY/FILE" to a path.

    cut: whether each download ends half-way. ranges: whether range requests are answered with that part.
    sent: the index of the first byte of each answer. refusal: the HTTP status of all refusals, or None if
    nothing is refused. is_gated: whether refusals are those of a gated repository. answers: the number of
    requests for files that are answered before the first refusal.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.ranges = files, False, False
        self.requests, self.sent = [], []
        self.refusal: int | None = None
        self.is_gated, self.answers = False, 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(files: dict[str, Path]):
    """Context manager that runs a ``Hub`` in a thread."""
    hub = Hub(files)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def hub_variables(home: Path, endpoint: str, offline: bool = False) -> dict[str, str]:
    """Return the environment variables that make huggingface_hub use this hub, with its cache in ``home``."""
    names = ("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_DOWNLOAD_TIMEOUT")
    return dict(zip(names, (str(home), endpoint, str(int(offline)), "1", "5")))
