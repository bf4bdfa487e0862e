"""`mx bench update`: what counts as an answer of two versions, and how long an engine says that it took weights."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mxbench.demo.workers import PROMPTS
from mxbench.update import command
from mxbench.update.clients import PauseWatch, asking, update_engine
from mxbench.update.command import Measured


class Engine(http.server.BaseHTTPRequestHandler):
    """Says what `said` has for a path: status and JSON. `asked` is set after each answer."""

    def do_GET(self) -> None:
        said: dict[str, tuple[int, Any]] = self.server.said  # type: ignore[attr-defined]
        status, body = said[self.path]
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.server.asked.release()  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def engine() -> Iterator[Any]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        server.said = {"/health": (200, None)}  # type: ignore[attr-defined]
        server.asked = threading.Semaphore(0)  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def url(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def seen(server: Any, status: int, body: Any) -> None:
    """Whoever asks has taken this answer: the third one that it gets is asked for after that."""
    server.said["/health"] = (status, body)
    while server.asked.acquire(blocking=False):
        pass
    for _ in range(3):
        server.asked.acquire()


def test_a_pause_is_from_the_drains_end_until_answers_come_again(engine: Any) -> None:
    with PauseWatch(url(engine)) as watch:
        seen(engine, 200, None)
        seen(engine, 503, {"phase": "pausing"})
        assert watch.began == 0
        seen(engine, 503, {"phase": "updating"})
        seen(engine, 503, {"phase": "updating"})
        assert watch.began > 0 == watch.ended
        seen(engine, 200, None)
    assert watch.ended > watch.began
    assert watch.seconds == watch.ended - watch.began


def test_no_pause_is_none(engine: Any) -> None:
    with PauseWatch(url(engine)) as watch:
        seen(engine, 200, None)
    assert watch.seconds == 0


def test_an_engine_that_did_not_replace_its_weights_ends_the_bench(engine: Any) -> None:
    for answer, what in (
        ((200, {"changed": False}), "had mx://a/1 already"),
        ((502, {}), "did not take mx://a/1: 502"),
    ):
        engine.said["/mx/update"] = answer
        with pytest.raises(RuntimeError, match=what):
            update_engine(url(engine), "mx://a/1")
    engine.said["/mx/update"] = (200, {"changed": True})
    update_engine(url(engine), "mx://a/1")


def test_requests_that_fail_are_told(engine: Any) -> None:
    engine.said["/v1/completions"] = (500, {})
    with asking([url(engine)]) as (client,):
        engine.asked.acquire()
    assert client.answers == []
    assert "500" in client.failures[0]


def test_answers_of_no_version_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an update are looked at when both its versions are known, and failures count."""
    versions = [Path("v1"), Path("v2"), Path("v3")]
    tokens = {"v1": [1, 1], "v2": [2, 2], "v3": [3, 3]}
    has = ["v1"]
    monkeypatch.setattr(command, "tokens_of", lambda _url, _prompt: tokens[has[-1]])
    measured = Measured(SimpleNamespace(versions=versions, urls=["http://engine"]))  # type: ignore[arg-type]
    one = SimpleNamespace(answers=[(PROMPTS[0], [1, 1]), (PROMPTS[1], [2, 2])], failures=[])
    other = SimpleNamespace(answers=[(PROMPTS[0], [1, 2]), (PROMPTS[1], [3, 3])], failures=["it is gone"])
    measured._asked = [(one, versions[:2]), (other, versions[:2])]  # type: ignore[list-item]
    measured._learn(versions[0])
    assert measured.answers == 0
    has.append("v2")
    measured._learn(versions[1])
    assert (measured.answers, measured.failures) == (4, ["it is gone"])
    assert measured.mixed == [f"{PROMPTS[0]!r}: [1, 2]", f"{PROMPTS[1]!r}: [3, 3]"]
    assert measured.figures() == {"mixed_answers": 2, "failed_requests": 1, "answers": 4}
