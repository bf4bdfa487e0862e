"""Engines as `mx rollout` sees them: what they say of themselves, and calls to them."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal, NamedTuple, TypeAlias

from mxcore.errors import EngineUnreachable
from mxserver.wire import SettingError

__all__ = ["Answer", "EngineCalls", "RunningEngine", "told_of"]

ROUTE = "/mx/update"
ASK_SECONDS = 30.0
POLL_SECONDS = 0.2
_UNDER_WAY = ("pausing", "updating")

Outcome: TypeAlias = Literal["to do", "had it", "updated", "failed", "back"]


class Answer(NamedTuple):
    """What an engine answered: the status of HTTP, and the JSON object (empty where it was none)."""

    status: int
    body: Mapping[str, Any]


@dataclass
class RunningEngine:
    """One engine, and what became of it. `before` is what it had when it was first asked, `place` where that is from.

    `version` is what it answers with now, empty where it must not answer; `checkpoint` the digest of its weights. For
    one thread at a time.
    """

    url: str
    before: str = ""
    version: str = ""
    outcome: Outcome = "to do"
    seconds: float = 0.0
    trouble: str = ""
    place: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str = ""

    def saw(self, answer: Answer) -> None:
        """Takes what the engine says of itself."""
        if first := _first(answer):
            self.version = str(first.get("version", "")) if first.get("ready") else ""
            self.checkpoint = str(first.get("checkpoint", ""))
        self.trouble = str(answer.body.get("trouble", ""))

    def begin(self, answer: Answer) -> None:
        """Takes what it has before anything is done."""
        self.saw(answer)
        first = _first(answer)
        self.before, place = str(first.get("version", "")), first.get("place")
        known = {"checkpoint": self.checkpoint} if self.checkpoint else {}
        self.place = {**place, **known, "version": self.before} if isinstance(place, dict) else {}


class EngineCalls:
    """HTTP to engines, with the token that they ask for. Thread-safe.

    Raises SettingError for a URL that is none of HTTP.
    """

    def __init__(self, token: str, update_seconds: float) -> None:
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._update_seconds = update_seconds

    def state(self, url: str) -> Answer:
        """What the engine has, and where an update is. Raises EngineUnreachable."""
        return self._call(url, ROUTE)

    def is_ready(self, url: str) -> bool:
        """Whether it answers requests: polled for ASK_SECONDS. Raises EngineUnreachable."""
        deadline = time.monotonic() + ASK_SECONDS
        while self._call(url, "/health").status != HTTPStatus.OK:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def update(self, url: str, body: Mapping[str, Any]) -> Answer:
        """Has the engine take other weights, and waits. Raises EngineUnreachable.

        Where the connection is lost meanwhile the engine goes on: it is asked what came of it.
        """
        try:
            return self._call(url, ROUTE, body)
        except EngineUnreachable:
            return self.settled(url)

    def settled(self, url: str) -> Answer:
        """What the engine has once no update is under way there; as after an update.

        Raises EngineUnreachable where it does not answer, or takes longer than an update may.
        """
        deadline = time.monotonic() + self._update_seconds
        while True:
            answer = self.state(url)
            phase = answer.body.get("phase")
            if answer.status != HTTPStatus.OK or phase not in _UNDER_WAY:
                status = HTTPStatus.SERVICE_UNAVAILABLE if phase == "failed" else answer.status
                return Answer(status, answer.body)
            if time.monotonic() >= deadline:
                raise EngineUnreachable(f"{url}: an update is under way for more than {self._update_seconds:g} s")
            time.sleep(POLL_SECONDS)

    def _call(self, url: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        if not url.startswith(("http://", "https://")):
            raise SettingError(f"{url}: an engine is named by a URL, such as http://host:8000")
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, **({"Content-Type": "application/json"} if data else {})}
        request = urllib.request.Request(url.rstrip("/") + path, data, headers)  # noqa: S310 - see above
        seconds = ASK_SECONDS if body is None else self._update_seconds
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:  # noqa: S310 - as above
                return Answer(answer.status, _parsed(answer.read()))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, _parsed(error.read()))
        except (OSError, http.client.HTTPException) as error:
            raise EngineUnreachable(f"{url}{path}: {error}") from error


def told_of(engine: RunningEngine) -> dict[str, Any]:
    """As JSON has it."""
    return {
        "url": engine.url,
        "before": engine.before,
        "version": engine.version,
        "outcome": engine.outcome,
        "seconds": engine.seconds,
        "trouble": engine.trouble,
        "checkpoint": engine.checkpoint,
    }


def _first(answer: Answer) -> Mapping[str, Any]:
    """What is said of the engine's own model."""
    models = answer.body.get("models")
    return models[0] if isinstance(models, list) and models and isinstance(models[0], dict) else {}


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
