"""The pages of who runs a server, against the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from click.testing import CliRunner

from mxcore.cli.main import mx
from mxserver.cli import main
from mxserver.web import pages

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
METRICS = (DOCS / "reference" / "metrics.md").read_text()
COMMANDS = (DOCS / "reference" / "operations.md").read_text()
RUNNING = (DOCS / "how-to" / "run-a-server.md").read_text()
ALL = "".join((METRICS, COMMANDS, RUNNING, (DOCS / "reference" / "alerts.md").read_text()))


def test_metrics_table_is_that_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("make_metrics_table", ROOT / "tools" / "make_metrics_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.with_table(METRICS) == METRICS, "run tools/make_metrics_table.py"


def test_flags_files_and_commands_exist() -> None:
    helps = CliRunner().invoke(main, ["--help"]).output
    for name in ("status", "sources", "doctor"):
        assert f"`mx {name}`" in COMMANDS
        helps += CliRunner().invoke(mx, [name, "--help"]).output
    for flag in set(re.findall(r"`(--[a-z-]+)", ALL)) - {
        "--load-format",
        "--set",
        "--build-arg",
    }:  # vLLM's, helm's, docker's
        assert flag in helps, flag
    for path in re.findall(r"`((?:deploy|tools|tests)/[\w./-]+)`", ALL):
        assert (ROOT / path).exists(), path


def test_assets_are_small_and_all_served() -> None:
    folder = ROOT / "mxserver" / "web" / "assets"
    assert {path.name for path in folder.iterdir()} == {file for file, _ in (pages.PAGE, *pages.ASSETS.values())}
    page = [path for path in folder.iterdir() if path.name != "errors.html"]  # that is asked for by who follows a link
    assert sum(path.stat().st_size for path in page) < 52_000  # 40,000 before it had a timeline and details to open
