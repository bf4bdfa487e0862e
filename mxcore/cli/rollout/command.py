"""`mx rollout`: another version of a model for running engines, some at a time."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mxcore.cli.failures import ending_on_errors
from mxcore.cli.rollout.engines import EngineCalls, told_of
from mxcore.cli.rollout.waves import Rollout, wanted_of
from mxcore.cli.server_calls import json_option
from mxcore.cli.tables import table, terminal_width

EPILOG = """
\b
Engines are vLLM's, with --load-format mx, --weight-transfer-config '{"backend": "mx"}' and
VLLM_PLUGINS=modelexpress_mx,mx_update (docs/reference/vllm.md, Updates). Each ends the requests that it has, takes the
weights, and answers again; the first one reads storage, the others take them from engines that have them.
Where one fails, nothing more is begun and those that were updated by this call go back (--no-back: they stay).
Called again, it goes on: engines that have the version are left alone.
\b
Exit codes: 0 all have it, 1 some do not, 2 usage, 3 an engine does not answer.
\b
Examples:
  mx rollout Qwen/Qwen3-32B --to 9216db5781bf21249d130ec9da846c4624c16137 --engines http://a:8000
  mx rollout qwen --to s3://models/qwen3-tuned --engines http://a:8000 http://b:8000 --at-once 4
  mx rollout qwen --to mx://policy/7 --engines http://a:8000
  mx rollout qwen --to /models/qwen3-tuned --engines http://a:8000 --dry-run
"""


@click.command(epilog=EPILOG)
@click.argument("model")
@click.option(
    "--to",
    required=True,
    metavar="VERSION",
    help="A revision, a folder, s3://, gs://, az://, mx://NAME/VERSION (published).",
)
@click.option("--engines", "urls", required=True, multiple=True, metavar="URL...", help="All engines, by URL.")
@click.argument("more", nargs=-1, metavar="")
@click.option("--at-once", default=1, show_default=True, type=click.IntRange(1), help="Engines in a wave.")
@click.option(
    "--drain-seconds",
    default=300.0,
    show_default=True,
    type=click.FloatRange(0, 86400, min_open=True),
    help="For requests that run, at most.",
)
@click.option(
    "--on-drain-limit",
    type=click.Choice(["give_up", "abort"]),
    default="give_up",
    show_default=True,
    help="What becomes of requests that run longer: the engine fails, or they do.",
)
@click.option(
    "--timeout-seconds",
    default=3600.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="For one engine, at most.",
)
@click.option("--token-file", type=click.Path(exists=True, dir_okay=False), help="What engines ask for.")
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
    token_file: str | None,
    back: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Gives running engines of MODEL, by the name that they serve it under, the weights of another version.

    Wave by wave, without a restart.
    """
    wanted = wanted_of(to)
    with ending_on_errors():
        token = Path(token_file).read_text().strip() if token_file else ""
        run = Rollout(
            EngineCalls(token, timeout_seconds),
            list(dict.fromkeys((*urls, *more))),
            wanted,
            {"drain_seconds": drain_seconds, "on_drain_limit": on_drain_limit},
            lambda line: click.echo(f"mx: {line}", err=True),
        )
        run.begin(model)
        is_complete = not run.to_do if dry_run else run.run(at_once, back=back)
    _print(run, wanted["version"], is_complete=is_complete, as_json=as_json)
    context.exit(0 if is_complete or dry_run else 1)


def _print(run: Rollout, version: str, *, is_complete: bool, as_json: bool) -> None:
    if as_json:
        told = [told_of(engine) for engine in run.engines]
        click.echo(json.dumps({"to": version, "complete": is_complete, "engines": told}))
        return
    rows = [(e.url, e.before, e.version, e.outcome, f"{e.seconds:g}", e.trouble) for e in run.engines]
    head = ("engine", "before", "now", "outcome", "seconds", "trouble")
    click.echo(table(head, rows, width=terminal_width(), may_shrink=("before", "now", "trouble")))
