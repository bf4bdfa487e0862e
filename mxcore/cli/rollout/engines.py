"""Engines as `mx rollout` sees them: what they say of themselves, and calls to them."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mxcore.errors import EngineUnreachable

__all__ = ["ASK_SECONDS", "EngineCalls", "RunningEngine"]

ASK_SECONDS = 30.0


class Answer(NamedTuple):
    status: int
    body: dict[str, Any]


@dataclass
class RunningEngine:
    """One engine, and what became of it."""

    url: str
    before: str = ""
    version: str = ""
    outcome: str = "to do"
    seconds: float = 0.0
    trouble: str = ""
    place: dict[str, str] = field(default_factory=dict)
    checkpoint: str = ""

    def saw(self, body: Mapping[str, Any]) -> None:
        """Takes what the engine says of itself."""
        models = body.get("models") or [{}]
        self.version = str(models[0].get("version", ""))
        self.checkpoint = str(models[0].get("checkpoint", ""))
        self.place = dict(models[0].get("place", {}))
        self.trouble = str(body.get("trouble", ""))


class EngineCalls:
    """HTTP to engines. Thread-safe."""

    def __init__(self, key: str, seconds: float) -> None:
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._seconds = seconds

    def __call__(self, url: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        """Raises EngineUnreachable."""
        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, **({"Content-Type": "application/json"} if data else {})}
        request = urllib.request.Request(url.rstrip("/") + path, data, headers)  # noqa: S310 - the user's own URLs
        seconds = ASK_SECONDS if body is None else self._seconds
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:  # noqa: S310 - as above
                return Answer(answer.status, _parsed(answer.read()))
        except urllib.error.HTTPError as error:
            return Answer(error.code, _parsed(error.read()))
        except (OSError, http.client.HTTPException) as error:
            raise EngineUnreachable(f"{url}{path}: {error}") from error


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
