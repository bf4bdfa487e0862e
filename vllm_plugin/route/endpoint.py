"""The route of updates and the readiness beside it, in vLLM's API server: an endpoint plugin (`vllm.endpoint_plugins`).

vLLM loads it where `VLLM_PLUGINS` names it (`VLLM_PLUGINS=modelexpress_mx,mx_update`), without its dev mode.

`POST /mx/update` pauses the engine, has its workers take other weights, and resumes it; `GET /mx/update` says what the
engine has. `/health` is 503 from the pause on until the engine answers again, and stays so where a model is not whole;
`/mx/live` is 200 meanwhile.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from mxserver.wire import setting

__all__ = ["MxEndpoint"]

Phase: TypeAlias = Literal["ready", "pausing", "updating", "failed"]

_log = logging.getLogger("vllm.modelexpress")
_PLACES = ("path", "revision", "uri")
_NAMES = (*_PLACES, "version", "checkpoint", "mode", "drain_seconds", "on_drain_limit")
_MOST_SECONDS = 86400.0
_PAUSED_SECONDS = 1.0  # for the engine to say whether it is paused; kubelet waits for a probe as long
_TOKEN_PATH = "MX_UPDATE_TOKEN_PATH"  # noqa: S105 - a setting's name
_NO_UPDATES = 'no updates here: start the engine with --load-format mx --weight-transfer-config \'{"backend": "mx"}\''


@dataclass(frozen=True)
class _Order:
    """What a caller wants. `info` are the fields of `transfer_engine.UpdateInfo`."""

    info: dict[str, str]
    mode: str
    drain_seconds: float
    aborts: bool

    @classmethod
    def of(cls, body: Any) -> _Order:
        """Raises ValueError, which says what is wrong."""
        if not isinstance(body, dict):
            raise ValueError("the body is a JSON object")
        if unknown := sorted(set(body) - set(_NAMES)):
            raise ValueError(f"unknown: {', '.join(unknown)}; there are {', '.join(_NAMES)}")
        info = {name: str(body[name]) for name in (*_PLACES, "version", "checkpoint") if body.get(name)}
        if sum(name in info for name in _PLACES) != 1:
            raise ValueError(f"one of {', '.join(_PLACES)} says which weights")
        mode, at_limit = body.get("mode", "wait"), body.get("on_drain_limit", "give_up")
        if mode not in ("wait", "abort", "keep"):
            raise ValueError(f"mode={mode!r}: wait, abort or keep")
        if at_limit not in ("give_up", "abort"):
            raise ValueError(f"on_drain_limit={at_limit!r}: give_up or abort")
        seconds = body.get("drain_seconds", 300.0)
        if not isinstance(seconds, int | float) or not 0 < seconds <= _MOST_SECONDS:
            raise ValueError(f"drain_seconds={seconds!r}: a number above 0, at most {_MOST_SECONDS:g}")
        return cls(info, mode, float(seconds), at_limit == "abort")


@dataclass
class _Progress:
    """Where an update is. `failed`: the model is not whole, and the engine stays paused."""

    phase: Phase = "ready"
    trouble: str = ""
    models: list[dict[str, Any]] = field(default_factory=list)


class MxEndpoint:
    """One API server's. All calls come from its event loop. The engine's pause is this object's alone."""

    name = "mx_update"
    required_tasks = None

    def __init__(self) -> None:
        self._engine: Any = None
        self._keys: list[str] = []
        self._served: list[str] = []
        self._progress = _Progress()
        self._is_busy = False
        self._was_paused = False
        self._pauses: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Future[Any]] = set()

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes; `/health` takes the place of vLLM's."""
        app.add_api_route("/mx/update", self.update, methods=["POST"], response_model=None)
        app.add_api_route("/mx/update", self.state, methods=["GET"], response_model=None)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        app.add_api_route("/mx/live", self.live, methods=["GET"], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Takes the engine (None: a server that has none), its models' names, and the keys that its API asks for."""
        self._engine = engine_client
        given = getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY") or []
        self._keys = [key for key in ([given] if isinstance(given, str) else given) if key]
        names = getattr(args, "served_model_name", None) or [getattr(args, "model", "")]
        self._served = [names] if isinstance(names, str) else [str(name) for name in names]

    async def live(self) -> Response:
        """200 unless only a restart helps: for a liveness probe, which must not end an engine that takes weights."""
        try:
            if self._engine is not None:
                await self._engine.check_health()
        except Exception as error:  # noqa: BLE001 - whatever it is, the engine does not answer
            return JSONResponse({"phase": "dead", "trouble": str(error)}, HTTPStatus.SERVICE_UNAVAILABLE)
        return Response(status_code=HTTPStatus.OK)

    async def health(self) -> Response:
        """200 while requests are answered; 503 with the reason while they are not.

        Of several API servers of an engine one updates it: the others see that it is paused.
        """
        may_ask = self._engine is not None and not self._is_busy
        paused = may_ask and await self._is_paused()
        if may_ask and self._progress.phase == "failed" and not paused:
            await self._look_again()
        told = {"phase": self._progress.phase, "trouble": self._progress.trouble}
        if told["phase"] == "ready" and paused:
            told = {"phase": "paused", "trouble": "the engine is paused, and not by this API server"}
        if told["phase"] != "ready":
            return JSONResponse(told, HTTPStatus.SERVICE_UNAVAILABLE)
        return await self.live()

    async def state(self, request: Request) -> JSONResponse:
        """What the engine's models are, and where an update is. 501: it takes no updates."""
        if refused := self._refused(request):
            return refused
        if not self._is_busy:
            try:
                await self._look()
            except Exception as error:  # noqa: BLE001 - the workers have no such method, or the engine is dead
                return self._answer(HTTPStatus.NOT_IMPLEMENTED, f"{_NO_UPDATES} ({_text(error)})")
        return self._answer(HTTPStatus.OK)

    async def update(self, request: Request) -> JSONResponse:
        """The body names one of path, revision and uri; also version, checkpoint, mode (wait, abort, keep),
        drain_seconds (300), and on_drain_limit: `give_up` (nothing changes) or `abort` (what still runs is aborted).

        200: the engine has the version; `changed` is false where it had it before, and was not paused. 409: another
        update is under way, or requests did not end in time. 415, 422: what was asked for has no meaning. 501: this
        engine takes no updates. 502: it failed, the old version answers. 503: it failed, the engine stays paused.
        """
        if refused := self._refused(request):
            return refused
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            return self._answer(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body is JSON: Content-Type: application/json")
        try:
            order = _Order.of(await request.json())
        except ValueError as error:
            return self._answer(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        if self._is_busy:
            return self._answer(HTTPStatus.CONFLICT, "another update is under way")
        self._is_busy = True  # nothing was awaited since it was looked at
        # It goes on when the caller is gone: an engine is never left paused for that.
        task = asyncio.create_task(self._updated(order))
        self._hold(task)
        return await asyncio.shield(task)

    async def _updated(self, order: _Order) -> JSONResponse:
        before = self._progress.phase
        try:
            try:
                await self._look()
            except Exception as error:  # noqa: BLE001 - as in `state`
                return self._answer(HTTPStatus.NOT_IMPLEMENTED, f"{_NO_UPDATES} ({_text(error)})")
            try:
                has_it = all(await self._engine.collective_rpc("mx_has_version", kwargs={"update_info": order.info}))
            except Exception as error:  # noqa: BLE001 - it cannot take them: nothing was paused, nothing changed
                self._tell(before, _text(error))
                is_ready = before == "ready"
                return self._answer(HTTPStatus.BAD_GATEWAY if is_ready else HTTPStatus.SERVICE_UNAVAILABLE)
            if has_it and before == "ready" and not await self._why_not():
                self._tell("ready")
                return self._answer(HTTPStatus.OK, changed=False)
            return await self._replaced(order)
        finally:
            self._is_busy = False

    async def _replaced(self, order: _Order) -> JSONResponse:
        """Pauses, takes the weights, and resumes where all is well; from the first line on nothing may be raised."""
        was_ready = self._progress.phase == "ready"
        self._tell("pausing")
        trouble = ""
        try:
            if trouble := await self._pause(order):
                if was_ready:
                    await self._resume()
                self._tell("ready" if was_ready else "failed", trouble)
                return self._answer(HTTPStatus.CONFLICT)
            self._tell("updating")
            await self._take(order.info)
        except Exception as error:  # noqa: BLE001 - what the workers have now decides
            _log.exception("the update failed")
            trouble = _text(error)
        try:
            reason = await self._why_not()
            if not reason:
                await self._reset_caches()
                if not trouble and self._progress.models:
                    await self._engine.update_weight_version(self._progress.models[0]["version"])
                await self._resume()
                self._tell("ready", trouble)
                return self._answer(HTTPStatus.BAD_GATEWAY if trouble else HTTPStatus.OK, changed=not trouble)
        except Exception as error:  # noqa: BLE001 - it stays paused, and says why
            _log.exception("the engine cannot go on after the update")
            reason = _text(error)
        self._tell("failed", "; ".join(filter(None, (trouble, reason))))
        return self._answer(HTTPStatus.SERVICE_UNAVAILABLE)

    async def _pause(self, order: _Order) -> str:
        """Empty when nothing is computed any more; else why not. The second case leaves requests running."""
        engine = self._engine
        self._pauses = pausing = asyncio.ensure_future(engine.pause_generation(mode=order.mode, clear_cache=True))
        self._hold(pausing)
        done, _ = await asyncio.wait({pausing}, timeout=order.drain_seconds)
        if not done:
            if not order.aborts:
                return f"requests still ran after {order.drain_seconds:g} s: nothing was changed"
            await engine.pause_generation(mode="abort", clear_cache=True)
        await pausing
        return "" if await engine.is_paused() else "somebody else resumed the engine: nothing was changed"

    async def _resume(self) -> None:
        """Requests run again. A pause that is given up may never end while they do, so nobody waits for it: but with
        data parallelism, where vLLM resumes nothing before that."""
        try:
            await self._engine.resume_generation()
        except Exception:
            if self._pauses is None or self._pauses.done():
                raise
            await self._pauses
            await self._engine.resume_generation()

    async def _is_paused(self) -> bool:
        """As it was, where the engine does not say so at once: it computes, takes weights, or has ended."""
        with suppress(Exception):
            self._was_paused = bool(await asyncio.wait_for(self._engine.is_paused(), _PAUSED_SECONDS))
        return self._was_paused

    async def _look_again(self) -> None:
        """Where an update failed, and somebody else had the engine resumed: it may have whole weights again."""
        with suppress(Exception):
            if not await self._why_not() and not self._is_busy:
                self._tell("ready")

    async def _take(self, info: dict[str, str]) -> None:
        """Raises what the workers raise."""
        rpc = self._engine.collective_rpc
        try:
            await rpc("start_weight_update")
            await rpc("update_weights", kwargs={"update_info": info})
        except Exception:
            with suppress(Exception):  # some engines may have begun, or done it: their session is over too
                await rpc("finish_weight_update")
            raise
        await rpc("finish_weight_update")

    async def _reset_caches(self) -> None:
        """What was computed with other weights is gone. Raises RuntimeError."""
        engine = self._engine
        if not await engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("the prefix cache could not be reset: it has blocks of the old version")
        await engine.reset_mm_cache()
        await engine.reset_encoder_cache()

    async def _look(self) -> list[list[dict[str, Any]]]:
        """Asks the workers what their models are."""
        told = await self._engine.collective_rpc("mx_update_state")
        ranks: list[list[dict[str, Any]]] = [each["models"] for each in told]
        self._progress.models = ranks[0] if ranks else []
        return ranks

    async def _why_not(self) -> str:
        """Empty where all models of all workers are whole and of one version; else why the engine must not answer."""
        ranks = await self._look()
        models = [model for rank in ranks for model in rank]
        versions = {model["part"]: model["version"] for model in models}
        if wrong := [model for model in models if not model["ready"] or versions[model["part"]] != model["version"]]:
            return str(wrong[0]["trouble"] or f"its processes have several versions: {wrong[0]['version']} too")
        try:  # of several engines behind one API vLLM gives the first one's answers alone, and everybody's errors
            await self._engine.collective_rpc("mx_update_state", kwargs={"expected": versions})
        except Exception as error:  # noqa: BLE001 - one of them says no
            return _text(error)
        return ""

    def _tell(self, phase: Phase, trouble: str = "") -> None:
        self._progress.phase, self._progress.trouble = phase, trouble

    def _answer(self, status: HTTPStatus, trouble: str | None = None, **more: object) -> JSONResponse:
        progress = self._progress
        told = {
            "phase": progress.phase,
            "trouble": progress.trouble if trouble is None else trouble,
            "models": progress.models,
            "served": self._served,
        }
        return JSONResponse({**told, **more}, status)

    def _hold(self, task: asyncio.Future[Any]) -> None:
        """Until it is done; what it raises was told by then."""
        self._tasks.add(task)

        def done(task: asyncio.Future[Any]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                task.exception()

        task.add_done_callback(done)

    def _refused(self, request: Request) -> JSONResponse | None:
        """Who may not ask; nobody may where the token cannot be read."""
        if self._engine is None:
            return JSONResponse({"trouble": "this server has no engine"}, HTTPStatus.NOT_IMPLEMENTED)
        try:
            keys = _token(setting(os.environ, _TOKEN_PATH)) or self._keys
        except OSError as error:
            return JSONResponse({"trouble": f"{_TOKEN_PATH}: {error}"}, HTTPStatus.SERVICE_UNAVAILABLE)
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        if keys and not (scheme.lower() == "bearer" and any(matches)):
            return JSONResponse({"trouble": "no token, or a wrong one"}, HTTPStatus.UNAUTHORIZED)
        return None


def _token(path: str | None) -> Sequence[str]:
    """That of a file, which may be replaced; nothing without a path. Raises OSError, also for an empty file."""
    if not path:
        return ()
    token = Path(path).read_text().strip()
    if not token:
        raise OSError(f"{path} is empty")
    return (token,)


def _text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
