"""A rollout: engines wave by wave, each ready before the next wave, and back again where one fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from threading import Thread
from typing import Any

from mxcore.cli.rollout.engines import EngineCalls, RunningEngine
from mxcore.errors import EngineUnreachable
from mxserver.wire import MxError, SettingError

__all__ = ["Rollout", "wanted_of"]


def wanted_of(to: str) -> dict[str, str]:
    """What an engine is asked for: a URI, a folder, or else a revision."""
    if "://" in to:
        return {"uri": to, "version": to}
    if to.startswith(("/", "./", "../")):
        path = str(Path(to).resolve()) if not to.startswith("/") else to
        return {"path": path, "version": path}
    return {"revision": to, "version": to}


class Rollout:
    """One call of the command: `begin`, then `run`. `told` is called with a line for whatever happens, on any thread.

    `options` go into each order to an engine.
    """

    def __init__(
        self,
        calls: EngineCalls,
        urls: Sequence[str],
        wanted: Mapping[str, str],
        options: Mapping[str, Any],
        told: Callable[[str], None],
    ) -> None:
        self.engines = [RunningEngine(url) for url in urls]
        self._calls = calls
        self._wanted = wanted
        self._options = options
        self._told = told

    def begin(self, model: str) -> None:
        """Asks all engines what they have. An update that is under way there, as of a call before, is waited for.

        Raises EngineUnreachable, and SettingError where one serves another model.
        """
        _all(lambda engine: self._look(engine, model), self.engines)

    @property
    def to_do(self) -> list[RunningEngine]:
        """Those that do not say that they have the version. A folder's and a prefix' files may be others by now."""
        return [engine for engine in self.engines if engine.version != self._wanted["version"]]

    def run(self, at_once: int, *, back: bool) -> bool:
        """Whether all engines have the version at the end.

        An engine that has these weights already says so, and is not paused.
        """
        is_fixed = "revision" in self._wanted
        todo = self.to_do if is_fixed else self.engines
        for engine in self.engines:
            if engine not in todo:
                engine.outcome = "had it"
        had = (engine for engine in self.engines if engine.version == self._wanted["version"])
        known = next((engine.checkpoint for engine in had), "")  # for engines that have no files of it
        for first in range(0, len(todo), at_once):
            wave = todo[first : first + at_once]
            wanted = {**self._wanted, **({"checkpoint": known} if known else {})}
            _all(partial(self._update, order=wanted), wave)
            if any(engine.outcome == "failed" for engine in wave):
                if back:
                    self._back()
                return False
            known = wave[0].checkpoint or known
        return True

    def _look(self, engine: RunningEngine, model: str) -> None:
        answer = self._calls.settled(engine.url)
        if answer.status not in (HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE) or "models" not in answer.body:
            reason = answer.body.get("trouble", "")
            raise EngineUnreachable(
                f"{engine.url}: HTTP {answer.status} {reason or 'and no route for updates'}: start it as "
                "docs/reference/vllm.md, Updates, says"
            )
        names = [str(name) for name in answer.body.get("served", [])]
        if model not in names:
            raise SettingError(f"{engine.url} serves {', '.join(names) or 'nothing'}, and not {model}")
        engine.begin(answer)

    def _update(self, engine: RunningEngine, order: Mapping[str, str]) -> bool:
        """Whether it has the version, and is ready."""
        began, version = time.monotonic(), order["version"]
        self._told(f"{engine.url}: {engine.version or 'nothing'} -> {version}")
        try:
            answer = self._calls.update(engine.url, {**order, **self._options})
            engine.saw(answer)
            is_done = answer.status == HTTPStatus.OK and engine.version == version and self._is_ready(engine)
            had_it = answer.body.get("changed") is False
        except EngineUnreachable as error:
            engine.trouble, is_done, had_it = str(error), False, False
        engine.seconds = round(time.monotonic() - began, 3)
        engine.outcome = "failed" if not is_done else "had it" if had_it else "updated"
        self._told(f"{engine.url}: {engine.outcome} after {engine.seconds:g} s {engine.trouble}".rstrip())
        return is_done

    def _is_ready(self, engine: RunningEngine) -> bool:
        if self._calls.is_ready(engine.url):
            return True
        engine.trouble = "it has the version and is not ready: /health is not 200"
        return False

    def _back(self) -> None:
        """Those that this call updated have what they had, one after the other."""
        for engine in self.engines:
            if engine.outcome != "updated":
                continue
            if not engine.place:
                engine.trouble = f"it stays at {engine.version}: where {engine.before or 'the old one'} is is not known"
                continue
            if self._update(engine, engine.place):
                engine.outcome = "back"


def _all(do: Callable[[RunningEngine], object], engines: Sequence[RunningEngine]) -> None:
    """On a thread each, which an interrupt does not wait for: engines go on by themselves. Raises the first MxError."""
    failures: list[tuple[int, BaseException]] = []

    def run(place: int, engine: RunningEngine) -> None:
        try:
            do(engine)
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append((place, error))

    threads = [Thread(target=run, args=pair, daemon=True) for pair in enumerate(engines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _place, error in sorted(failures, key=lambda pair: (not isinstance(pair[1], MxError), pair[0])):
        raise error
