"""`mx explain`: the ladder of load paths for this environment, without loading anything."""

from __future__ import annotations

import json
import logging

import click

from mxcore.cli.server_calls import json_option
from mxcore.cli.tables import table

EPILOG = """
\b
take: a worker would try this path. skip: it would leave it out. wait: that depends on others when it starts.
The first path that works ends the ladder; the others are for when it fails.
Exit codes: 0 some path can be taken, 1 none can, 2 usage.
\b
Examples:
  mx explain Qwen/Qwen3-32B
  MX_MODEL_URI=s3://models/qwen3 mx explain Qwen/Qwen3-32B
  mx explain Qwen/Qwen3-32B -- --tensor-parallel-size 2 --dtype float16
  mx explain /models/qwen3 --json | jq '.paths[] | select(.verdict == "take")'
"""


@click.command(epilog=EPILOG)
@click.argument("model", required=False)
@click.argument("engine_arguments", nargs=-1, metavar="[-- ENGINE ARGUMENTS]")
@click.option("--server", metavar="ADDRESS", help="As a worker with MODEL_EXPRESS_URL=ADDRESS.")
@json_option
@click.pass_context
def explain(
    context: click.Context,
    model: str | None,
    engine_arguments: tuple[str, ...],
    server: str | None,
    as_json: bool,
) -> None:
    """Where a worker here would take MODEL's weights from, in order, and why.

    With an engine installed it also says in what the nearest source differs from a worker with these arguments.
    """
    from mxcore.cli.explain.load_probes import Probe, probe
    from mxcore.load_ladder import RUNGS
    from mxcore.settings import load_settings

    logging.basicConfig(format="mx: %(message)s", level=logging.WARNING)
    settings = load_settings({"server_address": server} if server else {})
    found: list[Probe] = [probe(name, model or "", settings, engine_arguments) for name in settings.load_paths]
    if as_json:
        paths = [{"rung": p.rung, "what": RUNGS[p.rung], "verdict": p.verdict, "reason": p.reason} for p in found]
        click.echo(json.dumps({"model": model, "server": settings.server_address, "paths": paths}))
    else:
        rows = [(str(place), p.rung, p.verdict, p.reason) for place, p in enumerate(found, 1)]
        click.echo(table(("", "path", "verdict", "reason"), rows))
    context.exit(0 if any(p.verdict != "skip" for p in found) else 1)
