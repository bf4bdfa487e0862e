"""The `mx` command itself: the table of its subcommands, and how errors leave it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mxcore.cli import bench as bench_module
from mxcore.cli.main import COMMANDS, main, mx
from mxserver.wire import ServerUnreachable

HEAVY = ("torch", "vllm", "grpc", "numpy", "huggingface_hub")


def test_help_lists_every_subcommand() -> None:
    printed = CliRunner().invoke(mx, ["--help"])
    assert printed.exit_code == 0
    for name, subcommand in COMMANDS.items():
        assert f"  {name}" in printed.output
        assert subcommand.help.split()[0] in printed.output


def test_every_subcommand_of_the_table_is_there() -> None:
    for name in COMMANDS:
        command = mx.get_command(click.Context(mx), name)
        assert isinstance(command, click.Command)


def test_unknown_subcommand_is_a_usage_error() -> None:
    printed = CliRunner().invoke(mx, ["nothing-of-the-kind"])
    assert printed.exit_code == 2
    assert "nothing-of-the-kind" in printed.output


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, mxcore.cli.main as m\n"
        "from click.testing import CliRunner\n"
        "assert CliRunner().invoke(m.mx, ['--help']).exit_code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_expected_error_is_one_line_and_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def fails() -> None:
        raise ServerUnreachable("no answer from localhost:1 within 2 s")

    monkeypatch.setattr(mx, "get_command", lambda context, name: fails)
    monkeypatch.setattr(sys, "argv", ["mx", "bench"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "mx: no answer from localhost:1 within 2 s [MX_SERVER_UNREACHABLE]\n"


def test_bench_outside_a_checkout_says_where_benches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_module, "ROOT", tmp_path)
    printed = CliRunner().invoke(mx, ["bench", "load"])
    assert printed.exit_code == 2
    assert "source checkout" in printed.output


def test_bench_runs_what_the_checkout_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench_speed.py").write_text("command = None\n")
    (tmp_path / "bench" / "plot.py").write_text("")
    monkeypatch.setattr(bench_module, "ROOT", tmp_path)
    assert bench_module.bench_modules() == {"speed": "bench.bench_speed"}
