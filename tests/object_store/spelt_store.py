"""As much of S3 as a listing and GETs take, with the answers that a test spells out: keys that rclone cannot have, and
refusals. Checks no keys."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

HEAD = '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false</IsTruncated>'
CHANGED = "2026-01-01T00:00:00.000Z"


class Refusal(NamedTuple):
    """Instead of every answer; `cut`: it ends early."""

    status: int
    code: str = ""
    cut: bool = False


class SpeltStore:
    """`objects`: key → bytes of the bucket, whatever its name. `requests` counts them."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.refusal: Refusal | None = None
        self.requests = 0
        self.page_keys = 1000  # as S3 itself
        self.url = ""

    def environ(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "the-key-id",
            "AWS_SECRET_ACCESS_KEY": "the-secret-key",
            "AWS_REGION": "us-east-1",
        }

    def listed(self, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        after = max(query.get("start-after", [""])[0], query.get("continuation-token", [""])[0])
        text, folders, told, last = HEAD, set[str](), 0, ""
        for key in sorted(self.objects):
            if not key.startswith(prefix) or key <= after:
                continue
            if told == self.page_keys:
                text = text.replace("<IsTruncated>false", "<IsTruncated>true")
                text += f"<NextContinuationToken>{escape(last)}</NextContinuationToken>"
                break
            told, last = told + 1, key
            folder, slash, _ = key[len(prefix) :].partition("/")
            if query.get("delimiter") and slash:
                folders.add(f"{prefix}{folder}/")
                continue
            size = len(self.objects[key])
            text += f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>{hash(self.objects[key])}</ETag>"
            text += f"<LastModified>{CHANGED}</LastModified></Contents>"
        text += "".join(f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in sorted(folders))
        return (text + "</ListBucketResult>").encode()


class _Handler(BaseHTTPRequestHandler):
    store: SpeltStore
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.store.requests += 1
        parts = urlsplit(self.path)
        if (refusal := self.store.refusal) is not None:
            body = f"<Error><Code>{refusal.code}</Code><Message>no</Message></Error>".encode()
            self.answer(refusal.status, body, len(body) + 100 * refusal.cut)
        elif "list-type" in parts.query:
            self.answer(200, self.store.listed(parse_qs(parts.query)))
        elif (data := self.store.objects.get(unquote(parts.path).split("/", 2)[2])) is None:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self.file(data)

    def file(self, data: bytes) -> None:
        begin, _, last = self.headers.get("Range", f"bytes=0-{len(data) - 1}").removeprefix("bytes=").partition("-")
        part = data[int(begin) : int(last) + 1]
        headers = {"ETag": str(hash(data)), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {begin}-{int(begin) + len(part) - 1}/{len(data)}"
        self.answer(206 if "Range" in self.headers else 200, part, None, headers)

    def answer(self, status: int, body: bytes, size: int | None = None, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if size is None else size), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        self.close_connection = size is not None and size != len(body)


@contextmanager
def spelt_store(objects: dict[str, bytes]) -> Iterator[SpeltStore]:
    store = SpeltStore(objects)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store})) as server:
        store.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield store
        finally:
            server.shutdown()
            thread.join()
