"""A Hub on 127.0.0.1: real HTTP that drives the real `huggingface_hub`, and counts every byte that it sends.

Repositories are git-like: a commit is the digest of its files, a branch names a commit. Files with weight suffixes are
LFS files: `resolve` redirects them to a second origin (`localhost` instead of `127.0.0.1`) with a signed address, as
the Hub's CDN is, which must never see a token. Things that go wrong are asked for by a test: `cut`, `slow`, `gated`,
`private`, `expire`, `fail`.

It is written to as well: repositories and branches are created, contents of LFS files are received, once each, and a
commit appears whole. Who may write where is in `writers`.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".model", ".msgpack")
PAGE_ENTRIES = 4  # of a listing; the Hub's is 1000


@dataclass(slots=True)
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


@dataclass(slots=True)
class Hub:
    """What the server holds, and what it has done."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    tokens: dict[str, set[str]] = field(default_factory=dict)
    """Token -> gated and private repositories that it may read."""
    sent: Counter[str] = field(default_factory=Counter)
    """`org/name/path` -> bytes of it in bodies that were sent."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range), in order."""
    leaked: list[str] = field(default_factory=list)
    """Requests to the second origin that carried a token."""
    ranges: bool = True
    """Whether a Range is honoured."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """`org/name/path` -> bytes after which each of the next answers breaks off."""
    pauses: dict[str, list[float]] = field(default_factory=dict)
    """`org/name/path` -> seconds for which each of the next answers stops in its middle."""
    failures: dict[str, list[int]] = field(default_factory=dict)
    """`org/name/path` -> status of each of the next answers."""
    writers: dict[str, str] = field(default_factory=dict)
    """Token -> the organisation in which it may write."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """sha256 -> contents of LFS files that were received."""
    received: Counter[str] = field(default_factory=Counter)
    """sha256 -> bytes that were received of it."""
    posted: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)
    """(`org/name`, lines) of every commit that was sent."""
    answers: dict[str, bytes] = field(default_factory=dict)
    """End of a path of the API -> what is answered instead."""
    signature: int = 0
    """The generation of addresses at the second origin; older ones are refused."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, files: Mapping[str, bytes] | Path, *, branch: str = "main", **kind: bool) -> str:
        """A commit of these files (or of a folder), at the head of the branch; its digest."""
        if isinstance(files, Path):
            files = {
                str(path.relative_to(files)): path.read_bytes() for path in sorted(files.rglob("*")) if path.is_file()
            }
        repository = self.repositories.setdefault(name, Repository(**kind))
        listed = "".join(f"{path} {hashlib.sha256(data).hexdigest()}\n" for path, data in sorted(files.items()))
        commit = hashlib.sha1((name + listed).encode()).hexdigest()
        repository.commits[commit] = dict(files)
        self.blobs |= {hashlib.sha256(data).hexdigest(): data for path, data in files.items() if is_lfs(path)}
        repository.branches[branch] = commit
        return commit

    def weights_sent(self) -> int:
        """Bytes of weight files."""
        return sum(count for path, count in self.sent.items() if path.endswith(LFS_SUFFIXES))

    def forget(self) -> None:
        """Start counting anew."""
        self.sent.clear()
        self.received.clear()
        self.posted.clear()
        self.requests.clear()

    def take(self, queue: dict[str, list[Any]], key: str) -> Any:
        with self.lock:
            return queue[key].pop(0) if queue.get(key) else None


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that the client of this process uses, with a cache of its own and no token.

    A process of its own gets the same by HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET, which are read at import.
    """
    with serve() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self._answer()

    def do_PUT(self) -> None:
        """The contents of an LFS file."""
        data, oid = self.rfile.read(int(self.headers.get("Content-Length") or 0)), self.path.rpartition("/")[2]
        status = self.hub.take(self.hub.failures, "lfs")
        if status is not None:
            return self._error(status, None, "asked for by the test")
        assert hashlib.sha256(data).hexdigest() == oid
        with self.hub.lock:
            self.hub.received[oid] += len(data)
            self.hub.blobs[oid] = data
        return self._send(200, b"", {})

    def _answer(self) -> None:
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, self.headers.get("Range")))
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        for end, answer in self.hub.answers.items():
            if path.endswith(end):
                return self._send(200, answer, {"Content-Type": "application/json"})
        if self.command == "POST" and (written := self._written(path)) is not NotImplemented:
            return written
        if path.startswith("/cdn/"):
            return self._cdn(path.removeprefix("/cdn/"), query)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._info(match[1], match[2] or "main")
        # A revision's slashes are quoted: they are told from the path's by the address as it was sent.
        raw = [unquote(segment) for segment in parts.path.split("/")]
        if path.startswith("/api/models/") and raw[5:6] == ["tree"]:
            return self._tree("/".join(raw[3:5]), raw[6], "/".join(raw[7:]), query)
        if path.startswith("/api/models/") and raw[5:6] == ["paths-info"]:
            return self._paths_info("/".join(raw[3:5]), raw[6], parse_qs(self.body).get("paths", []))
        if raw[3:4] == ["resolve"]:
            return self._resolve("/".join(raw[1:3]), raw[4], "/".join(raw[5:]))
        return self._error(404, "RepoNotFound", "Repository not found")

    # Who may read what

    def _may_read(self, name: str) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return name in self.hub.tokens.get(token, ())

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, its files); None after an error was sent."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            self._error(401, None, "Invalid credentials in Authorization header")
            return None
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._may_read(name)):
            # As the Hub has it: 401 for strangers, 404 for who is known and may not.
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, repository.commits[commit]

    # Writing

    def _written(self, path: str) -> Any:
        """Answers what writes; NotImplemented for any other request."""
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(match[1], json.loads(self.body)["objects"])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path):
            name, verb, revision = match.groups()
            if self._files(name, "main") is None or not self._may_write(name):
                return None
            return {"preupload": self._preupload, "commit": self._commit, "branch": self._branch}[verb](name, revision)
        return NotImplemented

    def _may_write(self, name: str) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.hub.writers.get(token) == name.split("/")[0]:
            return True
        self._error(403 if token else 401, None, "You have no write access here")
        return False

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(name):
            return None
        if name in self.hub.repositories:
            return self._error(409, None, "You already created this repo")
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[name].private = "private" in (asked.get("visibility"), asked.get("private") and "private")
        return self._json({"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def _batch(self, name: str, objects: list[dict[str, Any]]) -> None:
        if not self._may_write(name):
            return None
        answers = []
        for one in objects:
            action = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}}
            answers.append(one | ({} if one["oid"] in self.hub.blobs else {"actions": action}))
        return self._json({"objects": answers, "transfer": "basic"})

    def _preupload(self, name: str, revision: str) -> None:
        found = self._files(name, revision)
        if found is None:
            return None

        def entry(path: str) -> dict[str, Any]:
            data = found[1].get(path)
            oid = None if data is None else hashlib.sha256(data).hexdigest() if is_lfs(path) else git_oid(data)
            mode = "lfs" if is_lfs(path) else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        return self._json({"files": [entry(one["path"]) for one in json.loads(self.body)["files"]]})

    def _commit(self, name: str, revision: str) -> None:
        status = self.hub.take(self.hub.failures, f"{name}/commit")
        if status is not None:
            return self._error(status, None, "asked for by the test")
        head, files = self._files(name, revision) or ("", {})
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", head) != head:
                return self._error(412, None, "A commit has happened since")
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.posted.append((name, lines))
        commit = self.hub.add(name, files, branch=revision)
        return self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def _branch(self, name: str, branch: str) -> None:
        repository = self.hub.repositories[name]
        repository.branches[branch] = repository.branches["main"]
        self._json({})

    # The API

    def _info(self, name: str, revision: str) -> None:
        found = self._files(name, revision)
        if found is not None:
            repository = self.hub.repositories[name]
            self._json(
                {
                    "id": name,
                    "modelId": name,
                    "sha": found[0],
                    "private": repository.private,
                    "gated": "manual" if repository.gated else False,
                    "siblings": [{"rfilename": path} for path in sorted(found[1])],
                }
            )

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _tree(self, name: str, revision: str, folder: str, query: dict[str, list[str]]) -> None:
        found = self._files(name, revision)
        if found is None:
            return None
        inside = f"{folder}/" if folder else ""
        below = {path: data for path, data in sorted(found[1].items()) if path.startswith(inside)}
        if folder and not below:
            return self._error(404, "EntryNotFound", f"{folder} does not exist")
        entries = []
        folders = sorted({str(parent) for path in below for parent in Path(path).parents if str(parent) != "."})
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        for path in folders:
            if path.startswith(inside) and (recursive or "/" not in path.removeprefix(inside)):
                entries.append({"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()})
        for path, data in below.items():
            if recursive or "/" not in path.removeprefix(inside):
                entries.append(self._entry(path, data))
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE_ENTRIES < len(entries):
            address = f"{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={start + PAGE_ENTRIES}"
            headers["Link"] = f'<{address}>; rel="next"'
        return self._json(entries[start : start + PAGE_ENTRIES], headers)

    def _paths_info(self, name: str, revision: str, paths: list[str]) -> None:
        found = self._files(name, revision)
        if found is not None:
            self._json([self._entry(path, found[1][path]) for path in paths if path in found[1]])

    # Files

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._files(name, revision)
        if found is None:
            return None
        commit, files = found
        if self.hub.repositories[name].gated and not self._may_read(name):
            known = bool(self.headers.get("Authorization"))
            return self._error(403 if known else 401, "GatedRepo", "Access to model is restricted.")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found", headers)
        key, data = f"{name}/{path}", files[path]
        status = self.hub.take(self.hub.failures, key)
        if status is not None:
            return self._error(status, None, "asked for by the test")
        if path.endswith(LFS_SUFFIXES):
            port = urlsplit(self.hub.url).port
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"http://localhost:{port}/cdn/{name}/{commit}/{path}?signature={self.hub.signature}",
            }
            return self._send(302, b"", headers)
        return self._body(key, data, headers | {"ETag": f'"{git_oid(data)}"'})

    def _cdn(self, address: str, query: dict[str, list[str]]) -> None:
        if self.headers.get("Authorization"):
            self.hub.leaked.append(self.path)
        organisation, repository, commit, path = address.split("/", 3)
        if query.get("signature") != [str(self.hub.signature)]:
            return self._error(403, None, "Request has expired")
        name = f"{organisation}/{repository}"
        data = self.hub.repositories[name].commits[commit][path]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self._body(f"{name}/{path}", data, {"ETag": etag, "Accept-Ranges": "bytes"})

    def _body(self, key: str, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "") if self.hub.ranges else None
        status, part = 200, data
        if asked is not None:
            start, stop = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
            if start >= len(data):
                return self._error(416, None, "Range not satisfiable", {"Content-Range": f"bytes */{len(data)}"})
            status, part = 206, data[start : stop + 1]
            headers = headers | {"Content-Range": f"bytes {start}-{stop}/{len(data)}"}
        if self.command == "HEAD":
            return self._send(status, b"", headers, length=len(part))
        cut, pause = self.hub.take(self.hub.cuts, key), self.hub.take(self.hub.pauses, key)
        sending = part if cut is None else part[:cut]
        with self.hub.lock:
            self.hub.sent[key] += len(sending)
        self._head(status, headers, len(part))
        with suppress(ConnectionError):  # a client that gave up waiting
            half = len(sending) // 2
            self.wfile.write(sending[:half])
            if pause is not None:
                self.wfile.flush()
                time.sleep(pause)
            self.wfile.write(sending[half:])
        if cut is not None or pause is not None:
            self.close_connection = True
        return None

    # Answers

    def _head(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], length: int | None = None) -> None:
        self._head(status, headers, len(body) if length is None else length)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        told = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | dict(headers or {})
        self._send(status, json.dumps({"error": message}).encode(), told)
