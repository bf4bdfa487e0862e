"""The route of updates and the readiness beside it, over an engine that pauses as vLLM does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.plugin.small_engine import WAIT_SECONDS, SmallEngine, served

TWO = {"revision": "two", "version": "two"}


@asynccontextmanager
async def calling(engine: SmallEngine, **arguments: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = await asyncio.to_thread(served, engine, **arguments)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
        yield client


def with_engine(
    test: Callable[[SmallEngine, httpx.AsyncClient], Awaitable[None]], engine: SmallEngine | None = None, **given: Any
) -> None:
    async def run() -> None:
        made = engine or SmallEngine()
        async with calling(made, **given) as client:
            await test(made, client)

    asyncio.run(run())


async def update(client: httpx.AsyncClient, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = await client.post("/mx/update", json={**TWO, **body})
    return answer.status_code, answer.json()


async def health(client: httpx.AsyncClient) -> list[int]:
    """Of readiness and of liveness."""
    return [(await client.get(path)).status_code for path in ("/health", "/mx/live")]


def test_an_update_is_paused_for_and_unready_until_it_is_over() -> None:
    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        assert await health(client) == [200, 200]
        engine.may_go_on.clear()
        updating = asyncio.create_task(update(client))
        assert await asyncio.to_thread(engine.has_begun.wait, WAIT_SECONDS)
        assert await health(client) == [503, 200]
        assert (await client.get("/mx/update")).json()["phase"] == "updating"
        assert (await update(client))[0] == 409
        engine.may_go_on.set()
        status, told = await updating
        assert (status, told["changed"], told["phase"], told["trouble"]) == (200, True, "ready", "")
        assert told["models"][0]["version"] == "two"
        assert engine.calls == ["pause wait", "update", "reset", "version two", "resume"]
        assert await health(client) == [200, 200]
        assert (await client.get("/mx/update")).json()["served"] == ["demo"]

    with_engine(test)


def test_requests_that_do_not_end_in_time_keep_the_old_version() -> None:
    """Nobody waits for the pause that was given up: under constant requests it never ends."""

    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        engine.running = 1
        status, told = await update(client, drain_seconds=0.01)
        assert (status, told["phase"], told["models"][0]["version"]) == (409, "ready", "one")
        assert "nothing was changed" in told["trouble"]
        assert not engine.paused
        assert await health(client) == [200, 200]
        status, told = await update(client, drain_seconds=0.01, on_drain_limit="abort")
        assert (status, told["models"][0]["version"]) == (200, "two")
        assert engine.calls[-5:] == ["pause abort", "update", "reset", "version two", "resume"]

    with_engine(test)


def test_what_fails_before_the_first_byte_leaves_the_old_version_answering() -> None:
    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        engine.fails = ["before"]
        status, told = await update(client)
        assert (status, told["phase"], told["models"][0]["version"]) == (502, "ready", "one")
        assert "before the first byte" in told["trouble"]
        assert not engine.paused
        assert "version two" not in engine.calls

    with_engine(test)


def test_a_model_that_is_not_whole_stays_paused_until_an_update_succeeds() -> None:
    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        engine.fails = ["after", "after"]
        for _ in range(2):
            status, told = await update(client)
            assert (status, told["phase"]) == (503, "failed")
            assert "weights of two versions" in told["trouble"]
            assert engine.paused
            assert await health(client) == [503, 200]
        assert "resume" not in engine.calls
        assert (await update(client))[0] == 200
        assert not engine.paused
        assert await health(client) == [200, 200]

    with_engine(test)


def test_other_api_servers_of_the_engine_are_unready_too() -> None:
    """vLLM starts several with data parallelism: a probe asks any of them."""

    async def run() -> None:
        engine = SmallEngine()
        async with calling(engine) as one, calling(engine) as other:
            engine.may_go_on.clear()
            updating = asyncio.create_task(update(one))
            assert await asyncio.to_thread(engine.has_begun.wait, WAIT_SECONDS)
            assert await health(other) == [503, 200]
            engine.may_go_on.set()
            assert (await updating)[0] == 200
            assert await health(other) == [200, 200]

            engine.fails = ["after"]
            assert (await update(one, revision="three", version="three"))[0] == 503
            assert await health(one) == await health(other) == [503, 200]
            assert (await update(other, revision="four", version="four"))[0] == 200
            assert await health(one) == await health(other) == [200, 200]
            assert (await one.get("/mx/update")).json()["phase"] == "ready"

    asyncio.run(run())


def test_a_model_that_is_not_whole_stays_unready_though_somebody_resumes_the_engine() -> None:
    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        engine.fails = ["after"]
        assert (await update(client))[0] == 503
        await engine.resume_generation()
        assert await health(client) == [503, 200]

    with_engine(test)


def test_who_has_the_weights_is_not_paused() -> None:
    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        status, told = await update(client, revision="one", version="another name")
        assert (status, told["changed"], told["models"][0]["version"]) == (200, False, "another name")
        assert engine.calls == []

    with_engine(test)


def test_what_cannot_be_taken_is_refused_before_the_pause() -> None:
    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        answer = await client.post("/mx/update", json={"path": "/nothing"})
        assert (answer.status_code, answer.json()["phase"]) == (502, "ready")
        assert "no weight files are there" in answer.json()["trouble"]
        assert engine.calls == []

    with_engine(test)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "JSON object"),
        ({}, "one of path, revision, uri"),
        ({"path": "/a", "uri": "s3://b"}, "one of path, revision, uri"),
        ({**TWO, "vresion": "x"}, "vresion"),
        ({**TWO, "mode": "now"}, "mode='now'"),
        ({**TWO, "on_drain_limit": "wait"}, "on_drain_limit='wait'"),
        ({**TWO, "drain_seconds": 0}, "drain_seconds=0"),
        ({**TWO, "drain_seconds": "9"}, "drain_seconds='9'"),
        ({**TWO, "drain_seconds": 1e9}, "drain_seconds"),
    ],
)
def test_an_order_without_a_meaning_is_refused(body: Any, said: str) -> None:
    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        answer = await client.post("/mx/update", json=body)
        assert answer.status_code == 422
        assert said in answer.json()["trouble"]
        assert engine.calls == []

    with_engine(test)


def test_an_engine_that_takes_no_updates_says_so_and_answers_on() -> None:
    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        engine.takes_updates = False
        status, told = await update(client)
        assert status == (await client.get("/mx/update")).status_code == 501
        assert "--weight-transfer-config" in told["trouble"]
        assert engine.calls == []
        assert await health(client) == [200, 200]

    with_engine(test)


@pytest.mark.parametrize("differs", ["a rank", "a replica"])
def test_engines_that_came_to_have_several_versions_do_not_answer(differs: str) -> None:
    """Of replicas vLLM gives the first one's answers alone."""

    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        call_it = engine._call_it

        def partly(info: dict[str, str]) -> None:
            call_it(info)
            if differs == "a rank":
                engine.ranks[1]["version"] = "one"
            else:
                engine.replica = "one"

        engine._call_it = partly  # type: ignore[method-assign]
        status, told = await update(client)
        assert (status, told["phase"], engine.paused) == (503, "failed", True)
        engine._call_it = call_it  # type: ignore[method-assign]
        assert (await update(client, revision="three", version="three"))[0] == 200

    with_engine(test, SmallEngine(ranks=2))


def test_a_dead_engine_is_not_alive() -> None:
    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        engine.is_dead = True
        assert await health(client) == [503, 503]

    with_engine(test)


def test_the_apis_key_is_asked_for_or_a_token_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a token, the API's users may not replace the model; where it cannot be read, nobody may."""
    token = tmp_path / "token"

    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        async def statuses() -> dict[str, int]:
            found = {}
            for given in ("", "Bearer key", "key", "Bearer secret", "Bearer "):
                headers = {"Authorization": given} if given else {}
                found[given] = (await client.get("/mx/update", headers=headers)).status_code
                posted = await client.post("/mx/update", json={"mode": "?"}, headers=headers)
                assert posted.status_code == (422 if found[given] == 200 else found[given])
            return found

        closed = dict.fromkeys(("", "Bearer key", "key", "Bearer secret", "Bearer "), 401)
        assert await statuses() == {**closed, "Bearer key": 200}
        monkeypatch.setenv("MX_UPDATE_TOKEN_PATH", str(token))
        assert set((await statuses()).values()) == {503}
        token.write_text("\n")
        assert set((await statuses()).values()) == {503}
        token.write_text("secret\n")
        assert await statuses() == {**closed, "Bearer secret": 200}
        assert await health(client) == [200, 200]

    with_engine(test, api_key=["key"])


def test_what_is_not_json_by_its_type_orders_nothing() -> None:
    async def test(engine: SmallEngine, client: httpx.AsyncClient) -> None:
        answer = await client.post("/mx/update", content=json.dumps(TWO), headers={"Content-Type": "text/plain"})
        assert answer.status_code == 415
        assert engine.calls == []

    with_engine(test)
