"""The paths of the HTTP port: probes, metrics, the status page and its data; and who may see them.

Probes, metrics and the page's own files are open: they name no model, worker or address. The rest needs a token where
the server has tokens: as `Authorization: Bearer`, or as the password that a browser asks for.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import ipaddress
import logging
from collections.abc import Awaitable, Callable
from importlib import resources

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mxserver.security import AccessError, AccessUnknown, Authenticator, Role, Unauthenticated
from mxserver.web.models_view import StatusQuery
from mxserver.web.status import StatusView

_LOG = logging.getLogger(__name__)

Endpoint = Callable[[Request], Response]

ASSETS = {
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/drawings.js": ("drawings.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/errors": ("errors.html", "text/html"),
}
PAGE = ("page.html", "text/html")
COMPRESS_FROM_BYTES = 1024
MOST_LISTED = 10_000
_COUNTS = ("replicas", "bars", "loads")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "mxserver",
}
CHALLENGE = 'Basic realm="mxserver: a token as the password", charset="UTF-8"'


def application(
    registry: CollectorRegistry,
    view: StatusView,
    not_ready: Callable[[], str | None],
    authenticator: Authenticator | None = None,
    names: tuple[str, ...] = (),
    *,
    model_registry: CollectorRegistry,
    not_alive: Callable[[], str | None] = lambda: None,
) -> ASGIApp:
    """All pages. Without an authenticator all is open. `registry` names no model, `model_registry` does.

    `not_ready` returns why the server is not ready, or None, `not_alive` why only a restart helps. Neither waits: both
    are answered without a thread, also while all threads wait for the store.
    """

    def probe(problem: Callable[[], str | None]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(_: Request) -> Response:
            reason = problem()
            return PlainTextResponse("ok\n") if reason is None else PlainTextResponse(f"{reason}\n", 503)

        return answer

    def metrics_of(shown: CollectorRegistry) -> Endpoint:
        def metrics(request: Request) -> Response:
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
            return Response(encode(shown), headers={"Content-Type": content_type, "Vary": "Accept"})

        return metrics

    def status(request: Request) -> Response:
        asked = request.query_params
        counts = {name: asked[name] for name in _COUNTS if name in asked}
        for name, text in counts.items():
            if not (text.isascii() and text.isdigit() and len(text) < 9):
                return PlainTextResponse(f"{name}={text!r} must be a whole number, 0 to {MOST_LISTED}\n", 400)
        query = StatusQuery(
            models=tuple(asked.getlist("model")),
            sources=frozenset(asked.getlist("of")),
            ranks=frozenset(asked.getlist("ranks")),
            search=asked.get("search", ""),
            **{name: min(int(text), MOST_LISTED) for name, text in counts.items()},
        )
        return JSONResponse(view.as_json(query))

    guarded = {"/": _asset(*PAGE), "/status": status, "/metrics/models": metrics_of(model_registry)}
    routes = [
        Route("/livez", probe(not_alive)),
        Route("/readyz", probe(not_ready)),
        Route("/metrics", metrics_of(registry)),
    ]
    routes += [Route(path, _asset(*asset)) for path, asset in ASSETS.items()]
    routes += [Route(path, _guarded(endpoint, authenticator, names)) for path, endpoint in guarded.items()]
    return with_headers(routes)


def with_headers(routes: list[Route]) -> ASGIApp:
    """An application of these routes. Every answer has our headers; details of failures go to the log only."""
    paths = " ".join(sorted(route.path for route in routes))

    def not_found(_: Request, __: Exception) -> Response:
        return PlainTextResponse(f"nothing here; there is {paths}\n", 404)

    def failed(_: Request, __: Exception) -> Response:
        return PlainTextResponse("the page failed; the server's log has the reason\n", 500)

    app = Starlette(
        routes=routes,
        middleware=[Middleware(GZipMiddleware, minimum_size=COMPRESS_FROM_BYTES, compresslevel=3)],
        exception_handlers={404: not_found, Exception: failed},
    )
    app.router.redirect_slashes = False

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        complete = False

        async def send_with_headers(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await app(scope, receive, send_with_headers)
        except Exception:
            if not complete:
                raise  # uvicorn logs it, and cuts the connection
            _LOG.exception("page failed path=%s", scope["path"])

    return answer


def _asset(file: str, content_type: str) -> Endpoint:
    body = (resources.files("mxserver.web") / "assets" / file).read_bytes()
    headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()[:16]}"', "Cache-Control": "no-cache"}

    def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=content_type, headers=headers)

    return answer


def is_own_name(host: str, names: tuple[str, ...]) -> bool:
    """Whether a Host header may be this server's: an address, a name that nobody can register, or one of `names`.

    Any other site could make its own name lead here, and have the browser of who visits it read the page.
    """
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    name = name.lower().strip("[]").rstrip(".")
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return "." not in name or name.endswith(_NOT_PUBLIC) or "*" in names or name in names


_NOT_PUBLIC = (".svc", ".cluster.local", ".localhost", ".internal")


def _guarded(endpoint: Endpoint, authenticator: Authenticator | None, names: tuple[str, ...]) -> Endpoint:
    """The endpoint for callers with the role read; others get a 401 with a challenge that browsers understand."""
    if authenticator is None:

        def answer_by_own_name(request: Request) -> Response:
            host = request.headers.get("host", "")
            if not is_own_name(host, names):
                text = f"{host[:200]!r} is no name of this server; set MX_SERVER_METRICS_HOSTS to its names\n"
                return PlainTextResponse(text, 421)
            return endpoint(request)

        return answer_by_own_name

    def answer(request: Request) -> Response:
        try:
            caller = authenticator.authenticate(_token(request.headers.get("authorization", "")))
        except AccessUnknown as error:
            return PlainTextResponse(f"{error}\n", 503)
        except Unauthenticated as error:
            return PlainTextResponse(f"{error}\n", 401, {"WWW-Authenticate": CHALLENGE})
        except AccessError as error:
            return PlainTextResponse(f"{error}\n", 403)
        if caller.role < Role.READ:
            return PlainTextResponse(f"{caller.subject} may not read\n", 403)
        return endpoint(request)

    return answer


def _token(authorization: str) -> bytes:
    """The token of `Bearer TOKEN`, or the password of `Basic`. Raises Unauthenticated."""
    scheme, _, value = authorization.partition(" ")
    token = value.strip().encode()
    if scheme.lower() == "basic":
        try:
            token = base64.b64decode(token, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            token = b""
    elif scheme.lower() != "bearer":
        token = b""
    if not token:
        raise Unauthenticated("a token is needed: as `Authorization: Bearer TOKEN`, or as the password")
    return token
