"""`mx rollout`: another version of a model for running engines, some at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mxcore.cli.rollout.engines import ASK_SECONDS, EngineCalls, RunningEngine
from mxcore.cli.server_calls import json_option
from mxcore.cli.tables import table
from mxcore.errors import EngineUnreachable
from mxserver.wire import SettingError

POLL_SECONDS = 0.2

EPILOG = """
\b
Engines are vLLM's, with --load-format mx, --weight-transfer-config '{"backend": "mx"}' and
VLLM_PLUGINS=modelexpress_mx,mx_update (docs/vllm.md, Updates). Each ends the requests that it has, takes the
weights, and answers again; the first one reads storage, the others take them from engines that have them.
Where one fails, nothing more is begun and those that were updated by this call go back (--no-back: they stay).
Called again, it goes on: engines that have the version are left alone.
\b
Exit codes: 0 all have it, 1 some do not, 2 usage, 3 an engine does not answer.
\b
Examples:
  mx rollout Qwen/Qwen3-32B --to 9216db5781bf21249d130ec9da846c4624c16137 --engines http://a:8000 http://b:8000
  mx rollout qwen --to s3://models/qwen3-tuned --engines http://a:8000 --engines http://b:8000 --at-once 4
  mx rollout qwen --to /models/qwen3-tuned --engines http://a:8000 --dry-run
"""


class Rollout:
    """One call of the command. `told` is called with a line for whatever happens."""

    def __init__(self, calls: EngineCalls, options: Mapping[str, Any], told: Callable[[str], None]) -> None:
        self._calls = calls
        self._options = options
        self._told = told

    def look(self, engine: RunningEngine, model: str) -> None:
        """What the engine has. Raises EngineUnreachable, SettingError where it serves another model."""
        answer = self._calls(engine.url, "/mx/update")
        if answer.status != 200:
            raise EngineUnreachable(
                f"{engine.url}: no route for updates (HTTP {answer.status} {answer.body.get('trouble', '')}): start it "
                "as docs/vllm.md, Updates, says"
            )
        listed = self._calls(engine.url, "/v1/models").body.get("data", [])
        names = {str(entry.get(key)) for entry in listed for key in ("id", "root")}
        if model not in names:
            raise SettingError(f"{engine.url} serves {', '.join(sorted(names)) or 'nothing'}, and not {model}")
        engine.saw(answer.body)
        engine.before = engine.version

    def wave(self, engines: Sequence[RunningEngine], wanted: Mapping[str, str]) -> bool:
        """Updates these engines, all at once; whether each has the version and is ready."""
        with ThreadPoolExecutor(len(engines)) as pool:
            return all(list(pool.map(lambda engine: self._update(engine, wanted), engines)))

    def _update(self, engine: RunningEngine, wanted: Mapping[str, str]) -> bool:
        began = time.monotonic()
        self._told(f"{engine.url}: {engine.version} -> {wanted['version']}")
        try:
            answer = self._calls(engine.url, "/mx/update", {**wanted, **self._options})
            engine.saw(answer.body)
            is_done = answer.status == 200 and self._is_ready(engine)
        except EngineUnreachable as error:
            engine.trouble, is_done = str(error), False
        engine.seconds = round(time.monotonic() - began, 3)
        engine.outcome = "updated" if is_done else "failed"
        self._told(f"{engine.url}: {engine.outcome} after {engine.seconds:g} s {engine.trouble}".rstrip())
        return is_done

    def _is_ready(self, engine: RunningEngine) -> bool:
        deadline = time.monotonic() + ASK_SECONDS
        while True:
            status = self._calls(engine.url, "/health").status
            if status == 200:
                return True
            if time.monotonic() >= deadline:
                engine.trouble = f"not ready: /health gives {status}"
                return False
            time.sleep(POLL_SECONDS)


def wanted_of(to: str) -> dict[str, str]:
    """What an engine is asked for: a URI, a folder, or else a revision."""
    if "://" in to:
        return {"uri": to, "version": to}
    if to.startswith(("/", "./", "../")):
        path = str(Path(to).resolve()) if not to.startswith("/") else to
        return {"path": path, "version": path}
    return {"revision": to, "version": to}


@click.command(epilog=EPILOG)
@click.argument("model")
@click.option("--to", required=True, metavar="VERSION", help="A revision, a folder, or s3://, gs://, az://.")
@click.option("--engines", "urls", required=True, multiple=True, metavar="URL", help="An engine; several times.")
@click.argument("more", nargs=-1, metavar="[URL]...")
@click.option("--at-once", default=1, show_default=True, type=click.IntRange(1), help="Engines in a wave.")
@click.option("--drain-seconds", default=300.0, show_default=True, help="For requests that run, at most.")
@click.option("--on-drain-limit", type=click.Choice(["give_up", "abort"]), default="give_up", show_default=True)
@click.option("--timeout-seconds", default=3600.0, show_default=True, help="For one engine, at most.")
@click.option("--api-key-file", type=click.Path(exists=True, dir_okay=False), help="The engines' API key.")
@click.option("--back/--no-back", default=True, show_default=True, help="Undo where an engine fails.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@json_option
@click.pass_context
def rollout(
    context: click.Context,
    model: str,
    to: str,
    urls: tuple[str, ...],
    more: tuple[str, ...],
    at_once: int,
    drain_seconds: float,
    on_drain_limit: str,
    timeout_seconds: float,
    api_key_file: str | None,
    back: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Gives running engines of MODEL the weights of another version, wave by wave, without a restart."""
    key = Path(api_key_file).read_text().strip() if api_key_file else ""
    options = {"drain_seconds": drain_seconds, "on_drain_limit": on_drain_limit}
    run = Rollout(EngineCalls(key, timeout_seconds), options, lambda line: click.echo(f"mx: {line}", err=True))
    engines = [RunningEngine(url) for url in dict.fromkeys((*urls, *more))]
    wanted = wanted_of(to)
    with ThreadPoolExecutor(len(engines)) as pool:
        list(pool.map(lambda engine: run.look(engine, model), engines))
    is_complete = _rolled(run, engines, wanted, at_once, back=back, dry_run=dry_run)
    _print(engines, wanted["version"], is_complete=is_complete, as_json=as_json)
    context.exit(0 if is_complete or dry_run else 1)


def _rolled(
    run: Rollout,
    engines: Sequence[RunningEngine],
    wanted: Mapping[str, str],
    at_once: int,
    *,
    back: bool,
    dry_run: bool,
) -> bool:
    """Whether all engines have the version at the end."""
    places = {engine.url: dict(engine.place) for engine in engines}
    todo = []
    for engine in engines:
        if engine.version == wanted["version"]:
            engine.outcome = "had it"
        else:
            todo.append(engine)
    if dry_run:
        return not todo
    known = next((engine.checkpoint for engine in engines if engine.outcome == "had it"), "")
    for first in range(0, len(todo), at_once):
        wave = todo[first : first + at_once]
        if not run.wave(wave, {**wanted, **({"checkpoint": known} if known else {})}):
            updated = [engine for engine in todo if engine.outcome == "updated"]
            if back:
                for engine in updated:
                    if run.wave([engine], {**places[engine.url], "version": engine.before}):
                        engine.outcome = "back"
            return False
        known = known or wave[0].checkpoint
    return True


def _print(engines: Sequence[RunningEngine], version: str, *, is_complete: bool, as_json: bool) -> None:
    if as_json:
        told = [asdict(engine) for engine in engines]
        click.echo(json.dumps({"to": version, "complete": is_complete, "engines": told}))
        return
    rows = [(e.url, e.before, e.version, e.outcome, f"{e.seconds:g}", e.trouble) for e in engines]
    click.echo(table(("engine", "before", "now", "outcome", "seconds", "trouble"), rows))
