"""The route of updates and the readiness beside it, in vLLM's API server: an endpoint plugin (`vllm.endpoint_plugins`).

vLLM loads it where `VLLM_PLUGINS` names it (`VLLM_PLUGINS=modelexpress_mx,mx_update`), without its dev mode.

`POST /mx/update` pauses the engine, has its workers take other weights, and resumes it; `GET /mx/update` says what the
engine has. `/health` is 503 from the pause on until the engine answers again, and stays so where a model is not whole.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

__all__ = ["MxEndpoint"]

_log = logging.getLogger("vllm.modelexpress")
_PLACES = ("path", "revision", "uri", "version", "checkpoint")


@dataclass
class _Progress:
    """Where an update is. `failed`: the model is not whole, and the engine stays paused."""

    phase: Literal["ready", "pausing", "updating", "failed"] = "ready"
    trouble: str = ""
    models: list[dict[str, Any]] = field(default_factory=list)


class MxEndpoint:
    """One API server's. All calls come from its event loop."""

    name = "mx_update"
    required_tasks = None

    def __init__(self) -> None:
        self._engine: Any = None
        self._keys: list[str] = []
        self._progress = _Progress()
        self._owner = asyncio.Lock()
        self._tasks: set[asyncio.Task[JSONResponse]] = set()

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes; `/health` takes the place of vLLM's."""
        app.add_api_route("/mx/update", self.update, methods=["POST"], response_model=None)
        app.add_api_route("/mx/update", self.state, methods=["GET"], response_model=None)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Takes the engine, and the keys that its API asks for: the update asks for one of them too."""
        self._engine = engine_client
        given = getattr(args, "api_key", None) or os.environ.get("VLLM_API_KEY") or []
        self._keys = [given] if isinstance(given, str) else list(given)

    async def health(self) -> Response:
        """200 while requests are answered; 503 with the reason while they are not."""
        if self._progress.phase != "ready":
            return JSONResponse(asdict(self._progress), status_code=503)
        try:
            if self._engine is not None:
                await self._engine.check_health()
        except Exception as error:  # noqa: BLE001 - whatever it is, the engine does not answer
            return JSONResponse({"phase": "dead", "trouble": str(error)}, status_code=503)
        return Response(status_code=200)

    async def state(self, request: Request) -> JSONResponse:
        """What the engine's models are, and where an update is."""
        if self._is_stranger(request):
            return JSONResponse({"trouble": "no key of this API"}, status_code=401)
        if not self._owner.locked():
            await self._look()
        return JSONResponse(asdict(self._progress))

    async def update(self, request: Request) -> JSONResponse:
        """The body names one of path, revision and uri; also version, checkpoint, mode (wait, abort, keep),
        drain_seconds (300), and on_drain_limit: `give_up` (nothing changes) or `abort` (what still runs is aborted).

        200: the engine has the version. 409: another update is under way, or requests did not end in time. 422: what
        was asked for has no meaning. 502: it failed, the old version answers. 503: it failed, the engine stays paused.
        """
        if self._is_stranger(request):
            return JSONResponse({"trouble": "no key of this API"}, status_code=401)
        try:
            wanted = await request.json()
            info = {name: str(wanted[name]) for name in _PLACES if wanted.get(name)}
            mode, limit = str(wanted.get("mode", "wait")), float(wanted.get("drain_seconds", 300.0))
            at_limit = str(wanted.get("on_drain_limit", "give_up"))
        except (ValueError, TypeError, AttributeError) as error:
            return JSONResponse({"trouble": f"the body is not what it has to be: {error}"}, status_code=422)
        unknown = sorted(set(wanted) - {*_PLACES, "mode", "drain_seconds", "on_drain_limit"})
        if unknown or mode not in ("wait", "abort", "keep") or at_limit not in ("give_up", "abort") or not limit > 0:
            return JSONResponse({"trouble": f"unknown: {unknown or [mode, at_limit, limit]}"}, status_code=422)
        if self._owner.locked():
            return JSONResponse({**asdict(self._progress), "trouble": "another update is under way"}, status_code=409)
        # It goes on when the caller is gone: an engine is never left paused for that.
        task = asyncio.create_task(self._updated(info, mode, limit, abort=at_limit == "abort"))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _updated(self, info: dict[str, str], mode: str, limit_seconds: float, *, abort: bool) -> JSONResponse:
        async with self._owner:
            was_whole = self._progress.phase != "failed"
            self._tell("pausing")
            try:
                if trouble := await self._pause(mode, limit_seconds, abort=abort):
                    await self._engine.resume_generation()
                    self._tell("ready", trouble)
                    return JSONResponse(asdict(self._progress), status_code=409)
                self._tell("updating")
                return await self._replace(info)
            except Exception as error:  # noqa: BLE001 - the engine must not be left paused without a reason
                _log.exception("the update failed")
                self._tell("failed", f"{type(error).__name__}: {error}")
                if was_whole and await self._look():
                    await self._engine.resume_generation()
                    self._tell("ready", self._progress.trouble)
                return JSONResponse(asdict(self._progress), status_code=502 if self._is_ready else 503)

    @property
    def _is_ready(self) -> bool:
        return self._progress.phase == "ready"

    async def _replace(self, info: dict[str, str]) -> JSONResponse:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine = self._engine
        trouble = ""
        try:
            await engine.start_weight_update()
            await engine.update_weights(WeightTransferUpdateRequest(update_info=info))
            await engine.finish_weight_update()
        except Exception as error:  # noqa: BLE001 - what the workers have now decides
            trouble = f"{type(error).__name__}: {error}"
        if not await self._look():
            self._tell("failed", trouble or "the model is not whole")
            return JSONResponse(asdict(self._progress), status_code=503)
        await engine.reset_prefix_cache()
        await engine.reset_mm_cache()
        await engine.reset_encoder_cache()
        if not trouble:
            await engine.update_weight_version(self._progress.models[0]["version"])
        await engine.resume_generation()
        self._tell("ready", trouble)
        return JSONResponse(asdict(self._progress), status_code=502 if trouble else 200)

    async def _pause(self, mode: str, limit_seconds: float, *, abort: bool) -> str:
        """Empty when nothing is computed any more; else why not."""
        waiting = asyncio.ensure_future(self._engine.pause_generation(mode=mode, clear_cache=True))
        done, _ = await asyncio.wait({waiting}, timeout=limit_seconds)
        if not done:
            if not abort:
                await self._engine.resume_generation()
                await waiting
                return f"requests still ran after {limit_seconds:g} s: nothing was changed"
            await self._engine.pause_generation(mode="abort", clear_cache=True)
        await waiting
        return "" if await self._engine.is_paused() else "somebody else resumed the engine: nothing was changed"

    async def _look(self) -> bool:
        """Asks the workers what they have; whether all models are whole."""
        told = await self._engine.collective_rpc("mx_update_state")
        ranks = [models["models"] for models in told]
        self._progress.models = ranks[0] if ranks else []
        versions = {(model["part"], model["version"]) for models in ranks for model in models}
        agree = len(versions) == len({part for part, _version in versions})
        return agree and all(model["ready"] for models in ranks for model in models)

    def _tell(self, phase: Literal["ready", "pausing", "updating", "failed"], trouble: str = "") -> None:
        self._progress.phase, self._progress.trouble = phase, trouble

    def _is_stranger(self, request: Request) -> bool:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        return bool(self._keys) and not any(hmac.compare_digest(given, key.encode()) for key in self._keys)
