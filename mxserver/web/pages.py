"""What is at which path: probes, metrics, the status page and its data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from http import HTTPStatus
from importlib import resources

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from mxserver.web.http import Answer, Page, Request
from mxserver.web.status import DEFAULT_WORKERS, MOST_WORKERS, StatusView

ASSETS = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def all_pages(registry: CollectorRegistry, view: StatusView, not_ready: Callable[[], str | None]) -> dict[str, Page]:
    """Path → page. `not_ready` says why the server is not ready, or None."""
    pages: dict[str, Page] = {path: _asset(*asset) for path, asset in ASSETS.items()}

    def livez(_: Request) -> Answer:
        return Answer(b"ok\n")

    def readyz(_: Request) -> Answer:
        reason = not_ready()
        if reason is None:
            return Answer(b"ok\n")
        return Answer(f"{reason}\n".encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)

    def metrics(request: Request) -> Answer:
        encode, content_type = choose_encoder(request.accept)
        return Answer(encode(registry), content_type)

    def status(request: Request) -> Answer:
        text = request.query.get("workers", str(DEFAULT_WORKERS))
        if not (text.isascii() and text.isdigit() and len(text) < 9):
            return Answer(
                f"workers={text!r} must be a whole number, 0 to {MOST_WORKERS}\n".encode(),
                status=HTTPStatus.BAD_REQUEST,
            )
        data = view.as_json(min(int(text), MOST_WORKERS))
        return Answer(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(), "application/json")

    return pages | {"/livez": livez, "/readyz": readyz, "/metrics": metrics, "/status": status}


def _asset(file: str, content_type: str) -> Page:
    body = (resources.files("mxserver.web") / "assets" / file).read_bytes()
    answer = Answer(body, content_type, etag=f'"{hashlib.sha256(body).hexdigest()[:16]}"')
    return lambda _: answer
