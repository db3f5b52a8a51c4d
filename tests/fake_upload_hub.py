"""A hub on 127.0.0.1 that takes files: repositories, upload modes, large files in one part or several, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from tests.fake_hub import _git_sha1

LARGE = (".gguf", ".safetensors", ".bin")


class UploadHub:
    """``repositories``: {ORG/NAME: {file: bytes}} as committed; ``private``: those made so; ``stored``: large files by
    their SHA-256, committed or not; ``puts``: the large files, or parts, that were received, by what was asked for.

    ``trouble``: {step: what goes wrong}, of "whoami", "create", "yaml", "preupload", "batch", "put", "commit", "tree":
    an int (HTTP status), a function (called when half of a body has come; true: the rest is not taken) or, of
    "preupload", "ignore". ``chunk``: bytes of a part of a large file. ``token``: what has to be sent.
    """

    def __init__(self, token: str, trouble: Mapping[str, Any] | None = None, *, chunk: int | None = None) -> None:
        self.token, self.trouble, self.chunk = token, dict(trouble or {}), chunk
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.stored: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.puts: list[str] = []
        self.messages: list[str] = []
        self.strangers: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_args: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self)

            do_POST = do_PUT = do_GET  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> UploadHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        step, act = self._step(request.command, path)
        trouble = self.trouble.get(step)
        body = self._body(request, trouble if callable(trouble) else None)
        if body is None:
            return
        if step not in ("put", "complete") and request.headers.get("Authorization") != f"Bearer {self.token}":
            self._send(request, 401, {"error": "secret words of the server"})
        elif isinstance(trouble, int):
            self._send(request, trouble, {"error": "secret words of the server"})
        else:
            act(request, path, body)

    def _step(self, method: str, path: str) -> tuple[str, Callable[[Any, str, bytes], None]]:
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return "whoami", lambda request, _path, _body: self._send(request, 200, {"name": "me", "type": "user"})
        if path == "/api/validate-yaml":
            good = {"errors": [], "warnings": []}
            return "yaml", lambda request, _path, _body: self._send(request, 200, good)
        if path == "/api/repos/create":
            return "create", self._create
        if parts[:2] == ["api", "models"] and len(parts) > 4:
            return {
                "preupload": ("preupload", self._preupload),
                "commit": ("commit", self._commit),
                "tree": ("tree", self._tree),
            }.get(parts[4], ("info", self._info))
        if path.endswith(".git/info/lfs/objects/batch"):
            return "batch", self._batch
        if parts[0] == "large" and method == "PUT":
            return "put", self._put
        if parts[0] == "large":
            return "complete", self._complete
        return "info", self._info

    def _body(self, request: BaseHTTPRequestHandler, half: Callable[[], object] | None) -> bytes | None:
        length = request.headers.get("Content-Length")
        if length is None and request.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(request.rfile.readline(), 16):
                data += request.rfile.read(size)
                request.rfile.readline()
            request.rfile.readline()
            return data
        size = int(length or 0)
        data = request.rfile.read(size // 2)
        if half is not None and half():
            request.close_connection = True
            return None
        data += request.rfile.read(size - len(data))
        if len(data) < size:
            request.close_connection = True
            return None
        return data

    def _create(self, request: Any, _path: str, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        there = name in self.repositories
        self.repositories.setdefault(name, {})
        if not there and asked.get("visibility") == "private":
            self.private.add(name)
        self._send(request, 409 if there else 200, {"url": f"{self.url}/{name}"})

    def _preupload(self, request: Any, path: str, body: bytes) -> None:
        held = self.repositories[_repository(path)]
        ignore = self.trouble.get("preupload") == "ignore"
        found = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(LARGE)
            data = held.get(file["path"])
            oid = None if data is None else hashlib.sha256(data).hexdigest() if large else _git_sha1(data)
            mode = "lfs" if large else "regular"
            found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignore and large, "oid": oid})
        self._send(request, 200, {"files": found})

    def _batch(self, request: Any, _path: str, body: bytes) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            oid, size = one["oid"], one["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.stored:
                upload: dict[str, Any] = {"href": f"{self.url}/large/{oid}/{size}"}
                if self.chunk is not None:
                    count = -(-size // self.chunk)
                    places = {str(number): f"{self.url}/large/{oid}/part/{number}" for number in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(self.chunk), **places}
                entry["actions"] = {"upload": upload}
            objects.append(entry)
        self._send(request, 200, {"transfer": "multipart" if self.chunk else "basic", "objects": objects})

    def _put(self, request: Any, path: str, body: bytes) -> None:
        if "Authorization" in request.headers:
            self.strangers.append(path)  # the token is for the hub, not for where its large files lie
        self.puts.append(path)
        parts = path.strip("/").split("/")
        if parts[2] == "part":
            self.parts.setdefault(parts[1], {})[int(parts[3])] = body
        elif hashlib.sha256(body).hexdigest() == parts[1]:
            self.stored[parts[1]] = body
        self._send(request, 200, {}, {"ETag": f'"{len(body)}"'})

    def _complete(self, request: Any, path: str, body: bytes) -> None:
        oid = path.strip("/").split("/")[1]
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        whole = b"".join(self.parts[oid][number] for number in numbers)
        assert hashlib.sha256(whole).hexdigest() == oid
        self.stored[oid] = whole
        self._send(request, 200, {})

    def _commit(self, request: Any, path: str, body: bytes) -> None:
        held = dict(self.repositories[_repository(path)])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                held[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                held[value["path"]] = self.stored[value["oid"]]
        self.repositories[_repository(path)] = held
        told = {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.url}/{_repository(path)}/commit/1"}
        self._send(request, 200, told)

    def _tree(self, request: Any, path: str, _body: bytes) -> None:
        held = self.repositories[_repository(path)]
        found = [
            {"type": "file", "path": name, "size": len(data), "oid": _git_sha1(data)} for name, data in held.items()
        ]
        self._send(request, 200, found)

    def _info(self, request: Any, path: str, _body: bytes) -> None:
        name = _repository(path)
        if name not in self.repositories:
            self._send(request, 404, {"error": "secret words of the server"}, {"X-Error-Code": "RepoNotFound"})
            return
        self._send(request, 200, {"id": name, "sha": "1" * 40, "siblings": [], "tags": []})

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, value: Any, headers: Mapping[str, str] | None = None
    ) -> None:
        data = json.dumps(value).encode()
        request.send_response(status)
        more = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for key, text in more.items():
            request.send_header(key, text)
        request.end_headers()
        request.wfile.write(data)


def _repository(path: str) -> str:
    """ORG/NAME of an address of the interface for models."""
    return "/".join(path.strip("/").split("/")[2:4])
