"""A hub on 127.0.0.1 that speaks as much of the hub's protocol as a download needs, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_BLOCK = 64 << 10


class FakeHub:
    """Serves ``files`` as repository ``org/model``. ``trouble``: {"info" or a file name: what goes wrong}:
    an int (HTTP status), "gated", "no-revision", "drop" (connection cut half way), "wrong" (right size, other bytes), a
    function (called when half of the file is sent);
    for parts of files: "no-range" (the whole file is sent instead), "late" (only the first part succeeds), "short"
    (a part less than asked for), "elsewhere" (another part), "grown" (a size other than the announced one).

    ``requests`` collects (method, path); ``tokens`` the authorization headers seen; ``sent`` {file: body bytes that
    the operating system took from us}.
    """

    def __init__(self, files: Mapping[str, bytes], trouble: Mapping[str, Any] | None = None) -> None:
        self.files, self.trouble = dict(files), dict(trouble or {})
        self.requests: list[tuple[str, str]] = []
        self.tokens: list[str | None] = []
        self.sent: dict[str, int] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_args: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = request.path.split("?")[0]
        self.requests.append((request.command, path))
        self.tokens.append(request.headers.get("Authorization"))
        if path.startswith("/api/models/org/model"):
            if not self._fail(request, self.trouble.get("info"), body):
                self._send(request, 200, json.dumps(self._info()).encode(), {"Content-Type": "application/json"}, body)
            return
        name = path.removeprefix(f"/org/model/resolve/{COMMIT}/")
        if name == path or name not in self.files:
            self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        trouble = self.trouble.get(name)
        if self._fail(request, trouble, body):
            return
        data = self.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self._etag(name)}"', "Accept-Ranges": "bytes"}
        if trouble == "wrong":
            data = bytes(len(data))
        if (trouble == "drop" or callable(trouble)) and body:
            request.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                request.send_header(key, value)
            request.end_headers()
            request.wfile.write(data[: len(data) // 2])
            request.wfile.flush()
            if callable(trouble):
                trouble()
                request.wfile.write(data[len(data) // 2 :])
            request.close_connection = True
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if trouble == "no-range" or not span or not body:
            self._send(request, 200, data, headers, body, name)
        else:
            self._send_part(request, name, trouble, headers, int(span[1]), int(span[2]) + 1)

    def _send_part(
        self, request: BaseHTTPRequestHandler, name: str, trouble: Any, headers: dict[str, str], start: int, stop: int
    ) -> None:
        data = self.files[name]
        if trouble == "late" and start > 0:
            self._send(request, 500, b"", headers, True)
            return
        part = data[start : stop - (trouble == "short")]
        first = start + (trouble == "elsewhere")
        size = len(data) + (trouble == "grown")
        self._send(
            request,
            206,
            part,
            {**headers, "Content-Range": f"bytes {first}-{first + len(part) - 1}/{size}"},
            True,
            name,
        )

    def _fail(self, request: BaseHTTPRequestHandler, trouble: Any, body: bool) -> bool:
        headers = {"X-Repo-Commit": COMMIT, "X-Error-Message": "secret words of the server"}
        if trouble == "gated":
            self._send(request, 403, b"", {**headers, "X-Error-Code": "GatedRepo"}, body)
        elif trouble == "no-revision":
            self._send(request, 404, b"", {**headers, "X-Error-Code": "RevisionNotFound"}, body)
        elif isinstance(trouble, int):
            self._send(request, trouble, b"", headers, body)
        else:
            return False
        return True

    def _info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git_sha1(data)}
            if name.endswith(".safetensors"):
                sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        return {"id": "org/model", "modelId": "org/model", "sha": COMMIT, "siblings": siblings, "tags": []}

    def _etag(self, name: str) -> str:
        data = self.files[name]
        return hashlib.sha256(data).hexdigest() if name.endswith(".safetensors") else _git_sha1(data)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        headers: Mapping[str, str],
        body: bool,
        name: str = "",
    ) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(key, value)
        request.end_headers()
        if not body:
            return
        for at in range(0, len(data), _BLOCK):
            try:
                request.wfile.write(data[at : at + _BLOCK])
            except (BrokenPipeError, ConnectionResetError):  # the client had enough
                request.close_connection = True
                return
            if name:
                self.sent[name] = self.sent.get(name, 0) + len(data[at : at + _BLOCK])


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
