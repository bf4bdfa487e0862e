"""`mx models`: the server's model cache from a shell, a script or an init container."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mxcore.cli.connection import Connection, connection_options
from mxcore.cli.failures import EXIT_DAMAGED, ending_on_errors
from mxcore.cli.server_calls import json_option
from mxcore.cli.tables import bytes_text, short_id, table, terminal_width

if TYPE_CHECKING:
    from mxserver.wire.files import ModelClient
    from mxserver.wire.proto import model_pb2

EPILOG = """
\b
Exit codes: 0 done, 1 failed (a download too), 2 usage, 3 the server does not answer, 4 no such model or revision,
5 refused (pinned, in use), 6 files are damaged.
\b
Examples:
  mx models get meta-llama/Llama-3.1-8B-Instruct
  mx models get meta-llama/Llama-3.1-8B-Instruct --to /models/llama
  mx models get s3://bucket/prefix --pin --json
  mx models list
  mx models validate meta-llama/Llama-3.1-8B-Instruct
"""


@click.group(epilog=EPILOG)
@connection_options
@click.pass_context
def models(context: click.Context, connection: Connection) -> None:
    """The server's model cache: fill it before workers start, look at it, tidy it up."""
    context.obj = connection


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the group's options; its own win: `mx models get NAME --server ADDRESS`."""

    @connection_options
    @functools.wraps(command)
    def with_own(connection: Connection, **given: Any) -> Any:
        context = click.get_current_context()
        context.obj = connection.over(context.obj)
        return command(**given)

    return with_own


def _checked_name(_context: click.Context, _parameter: click.Parameter, name: str) -> str:
    """Before a server is asked, or waited for."""
    from mxserver.wire.files import name_problem, provider_of

    if problem := name_problem(provider_of(name), name):
        raise click.BadParameter(problem)
    return name


name_argument = click.argument("name", callback=_checked_name)
revision_option = click.option("--revision", metavar="REVISION", help="A branch, tag or commit. [default: main]")


@contextmanager
def _client(context: click.Context, *, patience_seconds: float = 60.0) -> Iterator[ModelClient]:
    """A client; an error ends the command."""
    from mxserver.wire.files import ModelClient

    connection: Connection = context.obj
    with (
        ending_on_errors(),
        ModelClient(
            connection.address, patience_seconds=patience_seconds, credentials=connection.credentials
        ) as client,
    ):
        yield client


def _marks(row: dict[str, Any]) -> str:
    marks = {"pinned": row["pinned"], "in use": row["in_use"], "without weights": not row["weights"]}
    return ", ".join(name for name, is_so in marks.items() if is_so)


def _print(as_json: bool, data: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(data) if as_json else text)


@models.command()
@name_argument
@revision_option
@click.option("--ignore-weights", is_flag=True, help="Only configuration, tokenizer and the like.")
@click.option("--pin", "pin_it", is_flag=True, help="Never evict it.")
@click.option("--to", "folder", type=click.Path(path_type=Path), help="Bring the files into this folder, too.")
@click.option("--hub-cache", type=click.Path(path_type=Path), help="Bring them into this folder in the hub's layout.")
@click.option("--streams", default=4, show_default=True, type=click.IntRange(1, 64), help="Streams at once.")
@click.option("--wait", default=60.0, show_default=True, metavar="SECONDS", help="How long to wait for a server.")
@json_option
@server_options
@click.pass_context
def get(
    context: click.Context,
    name: str,
    revision: str | None,
    ignore_weights: bool,
    pin_it: bool,
    folder: Path | None,
    hub_cache: Path | None,
    streams: int,
    wait: float,
    as_json: bool,
) -> None:
    """Has the server download a model, unless it is there; with --to or --hub-cache, fetches it from the server."""
    started = time.monotonic()
    with _client(context, patience_seconds=wait) as client, _Bar(name) as bar:
        commit = client.ensure(
            name,
            revision=revision,
            ignore_weights=ignore_weights,
            pin=pin_it,
            on_update=bar.show_update,
            on_wait=lambda error: bar.tell_wait(error, wait),
        )
        listed = client.list_files(name, revision=commit, ignore_weights=ignore_weights)
        data: dict[str, Any] = {
            "name": name,
            "revision": commit,
            "files": len(listed.files),
            "bytes": listed.size_bytes,
            "downloaded_bytes": bar.fetched_bytes,
        }
        if folder:
            report = client.fetch(
                name,
                folder,
                revision=commit,
                ignore_weights=ignore_weights,
                streams=streams,
                on_bytes=bar.counting("fetching", listed.size_bytes),
            )
            data["folder"] = str(folder)
            data["received_bytes"] = report.bytes_received
        if hub_cache:
            snapshot = client.fetch_to_hub_cache(
                name,
                hub_cache,
                revision=revision,
                ignore_weights=ignore_weights,
                streams=streams,
                on_bytes=bar.counting("fetching", listed.size_bytes),
            )
            data["snapshot"] = str(snapshot)
    data["seconds"] = round(time.monotonic() - started, 3)
    place = data.get("snapshot") or data.get("folder") or "the server's cache"
    _print(as_json, data, f"{name} is in {place}: {data['files']} files, {data['bytes']} bytes, {commit or 'latest'}")


@models.command("list")
@json_option
@server_options
@click.pass_context
def list_models(context: click.Context, as_json: bool) -> None:
    """What the server's cache holds."""
    from mxserver.wire.proto import model_pb2

    with _client(context) as client:
        answer = client.cached_models()
    rows: list[dict[str, Any]] = [
        {
            "name": model.model_name,
            "provider": model_pb2.ModelProvider.Name(model.provider).lower(),
            "revision": model.revision,
            "bytes": model.size_bytes,
            "files": model.file_count,
            "weights": model.has_weights,
            "pinned": model.pinned,
            "in_use": model.in_use,
            "last_used_ms": model.last_used_ms,
        }
        for model in answer.models
    ]
    data: dict[str, Any] = {"models": rows}
    data |= {name: getattr(answer, name) for name in ("used_bytes", "max_bytes", "free_bytes", "min_free_bytes")}
    head = ("MODEL", "REVISION", "SIZE", "FILES", "")
    cells = [
        (
            str(row["name"]),
            short_id(str(row["revision"])),
            bytes_text(row["bytes"]),
            str(row["files"]),
            _marks(row),
        )
        for row in rows
    ]
    lines = [table(head, cells, width=terminal_width(), may_shrink={"MODEL"}), ""] if cells else []
    limit = f" of {bytes_text(answer.max_bytes)}" if answer.max_bytes else ""
    room = f"{bytes_text(answer.used_bytes)}{limit}; {bytes_text(answer.free_bytes)} free"
    lines.append(f"{len(rows)} model{'s' * (len(rows) != 1)}, {room}")
    _print(as_json, data, "\n".join(lines))


@models.command()
@name_argument
@click.option("--revision", metavar="REVISION", help="This branch, tag or commit alone. [default: all]")
@click.option("--force", is_flag=True, help="Pinned ones too.")
@json_option
@server_options
@click.pass_context
def rm(context: click.Context, name: str, revision: str | None, force: bool, as_json: bool) -> None:
    """Removes a model with its files from the server's cache; without --revision, all its revisions."""
    with _client(context) as client:
        message = client.delete(name, revision=revision, force=force)
    _print(as_json, {"name": name, "message": message}, f"{name}: {message}")


@models.command()
@name_argument
@revision_option
@click.option("--off", is_flag=True, help="Let it be evicted again.")
@json_option
@server_options
@click.pass_context
def pin(context: click.Context, name: str, revision: str | None, off: bool, as_json: bool) -> None:
    """Keeps a model in the server's cache, whatever the limits say."""
    with _client(context) as client:
        commit = client.pin(name, revision=revision, pinned=not off)
    _print(
        as_json,
        {"name": name, "revision": commit, "pinned": not off},
        f"{name}@{commit} is {'not pinned any more' if off else 'pinned'}",
    )


@models.command()
@name_argument
@revision_option
@json_option
@server_options
@click.pass_context
def validate(context: click.Context, name: str, revision: str | None, as_json: bool) -> None:
    """Compares every file in the server's cache with the digest of its download."""
    checked, problems = 0, {}
    with _client(context) as client:
        for verdict in client.validate(name, revision=revision):
            checked += 1
            if verdict.problem:
                problems[verdict.relative_path] = verdict.problem
    lines = [f"{path} {problem}" for path, problem in problems.items()]
    if problems:
        lines.append(f"get them again with: mx models rm {name} && mx models get {name}")
    lines.append(f"{checked} files checked, {len(problems)} damaged")
    _print(as_json, {"name": name, "files": checked, "damaged": problems}, "\n".join(lines))
    if problems:
        sys.exit(EXIT_DAMAGED)


class _Bar:
    """A progress bar on stderr; if that is not a terminal, a line every ten seconds."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._terminal = sys.stderr.isatty()
        self._shown_at = time.monotonic()
        self._done = 0
        self._told_wait = False
        self.fetched_bytes = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            click.echo("\r\x1b[K", nl=False, err=True)

    def tell_wait(self, error: Exception, seconds: float) -> None:
        """Once."""
        if not self._told_wait and seconds > 0:
            self._told_wait = True
            click.echo(f"mx: {error}; waiting for it, at most {seconds:g} s", err=True)

    def show_update(self, update: model_pb2.ModelStatusUpdate) -> None:
        progress = update.progress
        self.fetched_bytes = max(self.fetched_bytes, progress.bytes_fetched)
        self._show(update.message, progress.bytes_done, progress.bytes_total)

    def counting(self, what: str, total_bytes: int) -> Callable[[int], None]:
        """A callback that adds up bytes."""
        self._done = 0

        def add(count: int) -> None:
            self._done += count
            self._show(what, self._done, total_bytes)

        return add

    def _show(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._shown_at < (0.1 if self._terminal else 10.0):
            return
        self._shown_at = now
        share = done / total if total else 0.0
        amounts = f"{bytes_text(done)} of {bytes_text(total)}"
        if self._terminal:
            filled = round(share * 30)
            line = f"\r\x1b[K{self._name} [{'#' * filled}{'.' * (30 - filled)}] {amounts} {what}"
            click.echo(line[:120], nl=False, err=True)
        else:
            click.echo(f"{self._name}: {share:.0%}, {amounts}, {what}", err=True)
