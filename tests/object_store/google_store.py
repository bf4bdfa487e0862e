"""Google's emulator (PyPI `gcp-storage-emulator`) with a model in it, and what it lacks of Google's XML interface.

The emulator knows the JSON interface alone, by which Run:ai's streamer reads. obstore lists and reads by the XML one:
that is answered here, out of the emulator.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from xml.sax.saxutils import escape

START_SECONDS = 120.0
BUCKET = "models"
_DATE = "Wed, 25 Nov 2026 12:00:00 GMT"


class _RefusedError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"the emulator answers {status}")
        self.status = status


class GoogleStore:
    """`url` is the emulator's, `xml_url` that of the XML interface over it; `put` before it is read."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self.url = f"http://{self.address}"
        command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port)]
        self._process = subprocess.Popen(
            [*command, "--in-memory", "--default-bucket", BUCKET], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert self._process.poll() is None, "the emulator ended"
                assert time.monotonic() < deadline, "the emulator does not listen"
                time.sleep(0.02)
        self._front = ThreadingHTTPServer(("127.0.0.1", 0), type("Front", (_Front,), {"store": self}))
        self.xml_url = f"http://127.0.0.1:{self._front.server_port}"
        self._thread = threading.Thread(target=self._front.serve_forever)
        self._thread.start()

    def put(self, key: str, data: bytes) -> None:
        query = urllib.parse.urlencode({"uploadType": "media", "name": key})
        self._ask("POST", f"/upload/storage/v1/b/{BUCKET}/o?{query}", data)

    def put_folder(self, folder: Path, prefix: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def listed(self, prefix: str) -> list[dict[str, Any]]:
        query = urllib.parse.urlencode({"prefix": prefix})
        found: dict[str, Any] = json.loads(self._ask("GET", f"/storage/v1/b/{BUCKET}/o?{query}"))
        return list(found.get("items", []))

    def read(self, key: str) -> bytes:
        return self._ask("GET", f"/download/storage/v1/b/{BUCKET}/o/{urllib.parse.quote(key, safe='')}?alt=media")

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        connection = HTTPConnection(self.address, timeout=START_SECONDS)
        try:
            connection.request(method, path, body, {"Content-Type": "application/octet-stream"})
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            raise _RefusedError(answer.status)
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._front.shutdown()
        self._thread.join()
        self._front.server_close()
        self._process.terminate()
        self._process.wait()


class _Front(BaseHTTPRequestHandler):
    store: GoogleStore

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        key = urllib.parse.unquote(parts.path).removeprefix(f"/{BUCKET}").removeprefix("/")
        try:
            data = self.store.read(key) if key else self._listing(dict(urllib.parse.parse_qsl(parts.query)))
        except _RefusedError as error:
            self.send_error(error.status)
            return
        headers = {"Last-Modified": _DATE, "ETag": '"1"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if key else None
        if wanted:
            begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            data = data[begin:end]
        self.send_response(206 if wanted else 200)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815 - the base class calls it so

    def _listing(self, query: dict[str, str]) -> bytes:
        rows = "".join(
            f"<Contents><Key>{escape(item['name'])}</Key><Size>{item['size']}</Size>"
            f"<ETag>{escape(item.get('etag', ''))}</ETag>"
            "<LastModified>2026-11-25T12:00:00.000Z</LastModified></Contents>"
            for item in self.store.listed(query.get("prefix", ""))
        )
        return f"<ListBucketResult>{rows}</ListBucketResult>".encode()

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""
