"""`mx doctor`: what works on this machine, what does not, and what to do about it."""

from __future__ import annotations

import json
import os
import sys

import click

from mxcore.cli.connection import Connection, connection_options
from mxcore.cli.server_calls import json_option

EXIT_FINDINGS = 1
_MARKS = {"ok": "ok  ", "note": "note", "warn": "WARN", "fail": "FAIL"}
_COLOURS = {"ok": "green", "note": None, "warn": "yellow", "fail": "red"}

EPILOG = """
\b
ok: works. note: is not there, and need not be. WARN: works worse than it could. FAIL: workers here will not work.
Exit codes: 0 nothing fails, 1 something does, 2 usage.
\b
Examples:
  mx doctor
  mx doctor --server mx-server:8001
  mx doctor --json | jq '.findings[] | select(.state == "fail")'
"""


@click.command(epilog=EPILOG)
@connection_options
@click.option("--no-server", is_flag=True, help="Look at this machine alone.")
@json_option
def doctor(connection: Connection, no_server: bool, as_json: bool) -> None:
    """What works on this machine, what does not, and what to do about it."""
    from mxcore.cli.doctor import (
        cuda as doctor_cuda,
    )
    from mxcore.cli.doctor import (
        machine as doctor_machine,
    )
    from mxcore.cli.doctor import (
        probes as doctor_probes,
    )
    from mxcore.cli.doctor import (
        server as doctor_server,
    )
    from mxcore.cli.doctor.findings import failed
    from mxcore.settings import load_settings

    findings = [*doctor_machine.all_findings(), *doctor_cuda.all_findings()]
    is_needed = doctor_probes.needs_nixl(findings, load_settings({}, told=True))
    findings += doctor_probes.all_findings(nixl_is_needed=is_needed)
    if not no_server:
        if connection.server is None:
            findings += doctor_server.environment(os.environ)
        if connection.server is not None or doctor_server.is_named(os.environ):
            findings += doctor_server.server(connection)
    if as_json:
        shown = [finding.as_json() for finding in findings]
        click.echo(json.dumps({"well": not failed(findings), "findings": shown}))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            mark = click.style(_MARKS[finding.state], fg=_COLOURS[finding.state])
            click.echo(f"{mark}  {finding.name:{width}}  {finding.fact}")
            if finding.do and finding.state != "ok":
                click.echo(f"      {'':{width}}  → {finding.do}")
    sys.exit(EXIT_FINDINGS if failed(findings) else 0)
