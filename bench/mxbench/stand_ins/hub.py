"""A hub to test with: HTTP on loopback, as much of the Hugging Face Hub's API as `huggingface_hub` needs.

Written after what that client asks for: GET /api/models/REPO[/revision/REV], HEAD and GET /REPO/resolve/REV/PATH with
ETag, X-Repo-Commit, X-Linked-Size and X-Linked-ETag, and a redirect to another path ("the CDN") for large files.
Faults are queued per path and happen once each.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 512 * 1024  # from this size on a file is stored as the hub stores LFS files
PIECE_BYTES = 64 * 1024


@dataclass
class Repository:
    """One model: branches, and files by commit."""

    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    listed: dict[str, list[str]] = field(default_factory=dict)  # commit → names that are listed beside the real ones
    gated: bool = False
    xet: bool = False  # large files are offered through Xet too, at a storage service that answers 403


@dataclass
class Fault:
    """What happens instead of an answer: a status, a cut after so many bytes, other bytes, or a wait."""

    status: int = 0
    retry_after: str = ""
    rate_limit: str = ""
    cut_after: int = -1
    replace_with: bytes | None = None
    gate: threading.Event | None = None
    gate_after: int = 0  # bytes that are sent before the gate


class HubStandIn:
    """The server. `url` is what HF_ENDPOINT is set to."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = defaultdict(Repository)
        self.faults: dict[str, list[Fault]] = defaultdict(list)  # "GET path/in/repo", "HEAD …" or "api" → in order
        self.requests: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.tokens: set[str] = set()
        self.cdn_tokens: set[str] = set()
        self.knows_ranges = True  # else every answer is the whole file, as some mirrors do
        self.reached = threading.Condition()  # notified whenever a body has come to a gate
        self.at_gate = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        # Two origins, as with the real one: the client follows redirects to another origin without its token.
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        self._threads = [
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}) for server in self._servers
        ]
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.daemon_threads = True
            thread.start()

    def add(self, repository: str, files: dict[str, bytes], *, ref: str = "main", listed: tuple[str, ...] = ()) -> str:
        """Adds a commit that `ref` stands for from now on; returns it."""
        text = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in files.items()}) + repr(listed)  # noqa: S324
        commit = hashlib.sha1(text.encode()).hexdigest()  # noqa: S324
        found = self.repositories[repository]
        found.refs[ref] = commit
        found.commits[commit] = dict(files)
        found.listed[commit] = list(listed)
        return commit

    def close(self) -> None:
        for faults in self.faults.values():
            for fault in faults:
                if fault.gate:
                    fault.gate.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    def wait_at_gate(self, count: int = 1, timeout: float = 60) -> None:
        with self.reached:
            assert self.reached.wait_for(lambda: self.at_gate >= count, timeout), f"{self.at_gate} of {count}"

    def take_fault(self, key: str) -> Fault | None:
        faults = self.faults.get(key)
        return faults.pop(0) if faults else None


class _Handler(BaseHTTPRequestHandler):
    """One connection; each server makes a subclass that knows its self.hub."""

    hub: HubStandIn
    protocol_version = "HTTP/1.1"
    timeout = 120

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "")
        if match := re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)", path):
            self.tree(match[1], match[2])
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            self.hub.tokens.add(token)
            self.api(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/((?:[^/]+/)?[^/]+)/resolve/([^/]+)/(.+)", path):
            self.hub.tokens.add(token)
            self.resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{40})/((?:[^/]+/)?[^/]+)/-/(.+)", path):
            self.hub.cdn_tokens.add(token)
            data = self.hub.repositories[match[2]].commits[match[1]][match[3]]
            self.body(match[3], data, {"ETag": f'"cdn-{len(data)}"'})
        elif path.startswith("/xet/"):
            self.xet(path)
        else:
            self.refuse(404, "EntryNotFound")

    def xet(self, path: str) -> None:
        self.hub.requests["xet"] += 1
        if path != "/xet/token":
            return self.refuse(403, "")
        token = {"casUrl": f"{self.hub.url}/xet", "exp": 2**33, "accessToken": "t"}
        return self.send(
            token,
            {
                "X-Xet-Cas-Url": str(token["casUrl"]),
                "X-Xet-Access-Token": "t",
                "X-Xet-Token-Expiration": str(token["exp"]),
            },
        )

    def api(self, name: str, revision: str) -> None:
        self.hub.requests["api"] += 1
        if fault := self.hub.take_fault("api"):
            return self.refuse(fault.status, "", fault.retry_after, fault.rate_limit)
        found = self.hub.repositories.get(name)
        if found is None:
            return self.refuse(401 if not self.headers.get("Authorization") else 404, "RepoNotFound")
        if found.gated and self.headers.get("Authorization") != "Bearer right":
            return self.refuse(403, "GatedRepo")
        commit = found.refs.get(revision, revision)
        if commit not in found.commits:
            return self.refuse(404, "RevisionNotFound")
        siblings = [sibling(path, data) for path, data in found.commits[commit].items()]
        siblings += [{"rfilename": path, "size": 1, "blobId": "0" * 40} for path in found.listed[commit]]
        return self.send({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})

    def tree(self, name: str, commit: str) -> None:
        files = self.hub.repositories[name].commits[commit]
        self.send([tree_entry(path, data) for path, data in files.items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.hub.repositories[name]
        commit = found.refs.get(revision, revision)
        data = found.commits.get(commit, {}).get(path)
        if data is None:
            return self.refuse(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit}
        if len(data) >= LARGE_BYTES:
            headers |= {
                "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"{self.hub.cdn_url}/cdn/{commit}/{name}/-/{path}",
            }
            if found.xet:
                headers["X-Xet-Hash"] = hashlib.sha256(data).hexdigest()
                headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/xet/token"
            if self.command == "HEAD" and (fault := self.hub.take_fault(f"HEAD {path}")):
                return self.refuse(fault.status, "", fault.retry_after, fault.rate_limit)
            self.send_response(302)
            for key, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(key, value)
            return self.end_headers()
        return self.body(path, data, headers | {"ETag": f'"{git_sha1(data)}"'})

    def body(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        self.hub.requests[f"{self.command} {path}"] += 1
        fault = self.hub.take_fault(f"{self.command} {path}") or Fault()
        if fault.status:
            self.refuse(fault.status, "", fault.retry_after, fault.rate_limit)
            return
        data = data if fault.replace_with is None else fault.replace_with
        begin = 0
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and self.hub.knows_ranges:
            begin = int(match[1])
        self.send_response(206 if begin else 200)
        headers["Content-Length"] = str(len(data) - begin)
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.pour(path, data[begin:], fault)

    def pour(self, path: str, data: bytes, fault: Fault) -> None:
        for at in range(0, len(data), PIECE_BYTES):
            if fault.gate and at >= fault.gate_after:
                with self.hub.reached:
                    self.hub.at_gate += 1
                    self.hub.reached.notify_all()
                fault.gate.wait()
                fault.gate = None
            if 0 <= fault.cut_after <= at:
                self.close_connection = True
                return
            try:
                self.wfile.write(data[at : at + PIECE_BYTES])
            except OSError:  # the client is gone
                self.close_connection = True
                return
            self.hub.bytes_sent[path] += len(data[at : at + PIECE_BYTES])

    def refuse(self, status: int, code: str, retry_after: str = "", rate_limit: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        if retry_after:
            self.send_header("Retry-After", retry_after)
        if rate_limit:
            self.send_header("RateLimit", rate_limit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, data: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(data).encode()
        self.send_response(200)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - git's own


def sibling(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
    if len(data) >= LARGE_BYTES:
        found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


def tree_entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
    if len(data) >= LARGE_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    hub = HubStandIn()
    try:
        yield hub
    finally:
        hub.close()
