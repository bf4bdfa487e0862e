"""What the route of updates asks of vLLM, over workers that have nothing but a version; it pauses as vLLM does."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI

from vllm_plugin.route.endpoint import MxEndpoint

WAIT_SECONDS = 60.0


class SmallEngine:
    """`fails` is what the next updates do: "before" their first byte, "after" it, or "" for well.

    `running` requests end when they are aborted. `calls` are what was asked of it that changes something, in order.
    """

    def __init__(self, version: str = "one", *, ranks: int = 1) -> None:
        self.ranks = [_model(version) for _ in range(ranks)]
        self.replica = version
        self.fails: list[str] = []
        self.running = 0
        self.paused = False
        self.calls: list[str] = []
        self.takes_updates = True
        self.is_dead = False
        self.has_begun = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self._is_idle = asyncio.Event()

    async def check_health(self) -> None:
        if self.is_dead:
            raise RuntimeError("the engine core died")

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(f"pause {mode}")
        self.paused = True
        if mode == "abort":
            self.running = 0
        if not self.running:
            self._is_idle.set()
        if mode == "wait":
            await self._is_idle.wait()

    async def resume_generation(self) -> None:
        self.calls.append("resume")
        self.paused = False

    async def is_paused(self) -> bool:
        return self.paused

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        self.calls.append("reset")
        return True

    async def reset_mm_cache(self) -> None:
        """Nothing is cached."""

    async def reset_encoder_cache(self) -> None:
        """Nothing is cached."""

    async def update_weight_version(self, version: str) -> None:
        self.calls.append(f"version {version}")

    async def collective_rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> list[Any]:
        if not self.takes_updates:
            raise AttributeError(f"no method {method}")
        given = kwargs or {}
        if method == "mx_update_state":
            return self._state(**given)
        if method == "mx_has_version":
            return self._has(given["update_info"])
        if method == "update_weights":
            await self._update(given["update_info"])
        return [None] * len(self.ranks)

    def _state(self, expected: dict[str, str] | None = None) -> list[dict[str, Any]]:
        if expected is not None and expected[""] != self.replica:
            raise RuntimeError(f"MX_UPDATE_FAILED: {self.replica} here")
        return [{"models": [dict(model)]} for model in self.ranks]

    def _has(self, info: dict[str, str]) -> list[bool]:
        if info.get("path") == "/nothing":
            raise RuntimeError("MX_UPDATE_FAILED: no weight files are there")
        found = [model["checkpoint"] == _digest(info) and model["ready"] for model in self.ranks]
        if all(found):
            self._call_it(info)
        return found

    async def _update(self, info: dict[str, str]) -> None:
        assert self.paused
        self.calls.append("update")
        self.has_begun.set()
        await asyncio.to_thread(self.may_go_on.wait, WAIT_SECONDS)
        how = self.fails.pop(0) if self.fails else ""
        if how == "after":
            for model in self.ranks:
                model.update(ready=False, trouble="it has weights of two versions")
        if how:
            raise RuntimeError(f"MX_UPDATE_FAILED: {how} the first byte")
        for model in self.ranks:
            model.update(checkpoint=_digest(info), ready=True, trouble="")
        self._call_it(info)

    def _call_it(self, info: dict[str, str]) -> None:
        self.replica = info["version"]
        for model in self.ranks:
            place = {name: info[name] for name in ("path", "revision", "uri") if name in info}
            model.update(version=info["version"], place=place)


def _model(version: str) -> dict[str, Any]:
    place = {"revision": version}
    return {
        "part": "",
        "version": version,
        "checkpoint": _digest(place),
        "place": place,
        "ready": True,
        "trouble": "",
    }


def _digest(info: dict[str, str]) -> str:
    return "digest of " + next(info[name] for name in ("path", "revision", "uri") if name in info)


def served(engine: SmallEngine, **arguments: Any) -> FastAPI:
    """vLLM's API server with nothing but the route: the model is called `demo`."""
    app, endpoint = FastAPI(), MxEndpoint()
    endpoint.attach_router(app)
    given = SimpleNamespace(**{"api_key": None, "served_model_name": ["demo"], "model": "/models/demo", **arguments})
    asyncio.run(endpoint.init_state(engine, None, given))
    return app


class Serving:
    """An engine's API on a port of the loopback interface, in a thread. End it with `close`.

    `asked` are the calls that came, such as "GET /health".
    """

    def __init__(self, engine: SmallEngine) -> None:
        listener = socket.create_server(("127.0.0.1", 0))  # calls wait in its queue until it is served
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.engine = engine
        self.asked: list[str] = []
        app = served(engine)

        async def noted(scope: Any, receive: Any, send: Any) -> None:
            self.asked.append(f"{scope['method']} {scope['path']}")
            await app(scope, receive, send)

        self._server = uvicorn.Server(uvicorn.Config(noted, log_config=None, lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
