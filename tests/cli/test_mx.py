"""The `mx` command itself: the table of its subcommands, and how errors leave it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mxbench import COMMANDS as COMMANDS_OF_MXBENCH
from mxcore.cli import bench as bench_module
from mxcore.cli.failures import exit_code
from mxcore.cli.main import COMMANDS, main, mx
from mxserver.wire import (
    FileRefused,
    ModelDownloadError,
    ModelNotFound,
    ServerRefused,
    ServerUnreachable,
    SettingError,
)
from tests.cli.mx_process import mx as run_mx

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


def test_what_ucx_warns_of_stays_off_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX logs to stdout, where the object of --json is."""
    code = (
        "import sys, click, mxcore.cli.main as m\n"
        "from mxcore.transfer.move import AgentSession\n"
        "@click.command()\n"
        "def agent():\n"
        "    AgentSession('w', tls='tcp', progress_thread=False).fence()\n"
        "    click.echo('{}')\n"
        "m.mx.get_command = lambda context, name: agent\n"
        "sys.argv[1:] = ['agent']\n"
        "m.main()"
    )
    monkeypatch.setenv("UCX_NOTHING_OF_THE_KIND", "1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "UCX_NOTHING_OF_THE_KIND" in done.stderr
    assert json.loads(done.stdout) == {}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, mxcore.cli.main as m\n"
        "from click.testing import CliRunner\n"
        "assert CliRunner().invoke(m.mx, ['--help']).exit_code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_expected_error_is_one_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def fails() -> None:
        raise ServerUnreachable("no answer from localhost:1 within 2 s")

    monkeypatch.setattr(mx, "get_command", lambda context, name: fails)
    monkeypatch.setattr(sys, "argv", ["mx", "bench"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 3
    assert (
        capsys.readouterr().err.splitlines()[0] == "mx: no answer from localhost:1 within 2 s [MX_SERVER_UNREACHABLE]"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingError("x"), 2),
        (ServerUnreachable("x"), 3),
        (ModelNotFound("x"), 4),
        (ServerRefused("x"), 5),
        (FileRefused("x"), 6),
        (ModelDownloadError("x"), 1),
        (OSError("x"), 1),
    ],
)
def test_one_exit_code_for_each_cause(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_usage_is_told_as_json_too() -> None:
    ran = run_mx("models", "get", "org/model", "--streams", "0", "--json")
    error = ran.json()["error"]
    assert (ran.code, error["code"], error["exit_code"]) == (2, "MX_USAGE", 2)
    assert "--streams" in error["message"]
    assert "Usage: mx models get" in ran.err


def test_a_code_of_the_server_stands_alone() -> None:
    error = ServerRefused("it is pinned [MX_MODEL_IN_USE]")
    assert (str(error), error.stable_code) == ("it is pinned [MX_MODEL_IN_USE]", "MX_MODEL_IN_USE")
    assert ServerRefused("no").stable_code == "MX_SERVER_REFUSED"


def test_interrupt_is_130() -> None:
    """While it waits for a server that does not answer, as a shell's Ctrl-C does it: SIGINT to the process."""
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's `&` has it ignored
    code = f"{heard}; from mxcore.cli.main import main; main()"
    arguments = ["models", "get", "org/model", "--wait", "600", "--server", "127.0.0.1:1", "--json"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert "waiting for it, at most 600 s" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        said, told = process.stderr.read(), process.stdout.read()
    assert process.returncode == 130
    assert said.strip().endswith("mx: interrupted")
    assert json.loads(told)["error"]["exit_code"] == 130


@pytest.mark.parametrize("name", ["s3://", "ftp://x/y", "a/b/c", "file://relative"])
def test_names_are_checked_before_a_server_is_waited_for(name: str) -> None:
    ran = run_mx("models", "get", name, "--server", "127.0.0.1:1", "--wait", "600")
    assert ran.code == 2
    assert "model name" in ran.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    ran = run_mx("completion", shell)
    assert ran.code == 0
    assert "_MX_COMPLETE" in ran.out


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    def printed(value: str) -> str:
        return CliRunner().invoke(mx, ["doctor", "--no-server"], color=True, env={"NO_COLOR": value}).output

    assert "\x1b[" in printed("")
    assert "\x1b[" not in printed("1")


def test_bench_names_those_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a checkout its root is where tests can be found; elsewhere nothing is added."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert bench_module.bench_modules() == COMMANDS_OF_MXBENCH
    assert str(bench_module.ROOT) in sys.path
    monkeypatch.setattr(sys, "path", before := list(sys.path))
    monkeypatch.setattr(bench_module, "ROOT", tmp_path)
    assert bench_module.bench_modules() == COMMANDS_OF_MXBENCH
    assert sys.path == before


def test_every_command_of_the_package_is_a_bench() -> None:
    folder = Path(sys.modules["mxbench"].__file__ or "").parent
    named = {f"mxbench.{file.parent.name}.command" for file in folder.glob("*/command.py")}
    assert named <= set(COMMANDS_OF_MXBENCH.values())


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("numpy", "pip install 'fastsafetensors"),
        ("no_such_engine", "no_such_engine: it is not installed"),
        ("tests.no_such_stand_in", "source checkout"),
    ],
)
def test_a_bench_that_lacks_a_package_is_listed_and_says_which(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, said: str
) -> None:
    """When it is imported, and when it runs."""
    lines = f"import click\n@click.command()\ndef command() -> None:\n    import {package}\n"
    (tmp_path / "late_need.py").write_text(lines)
    (tmp_path / "early_need.py").write_text(f"import {package}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late_need", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(bench_module, "bench_modules", lambda: {"early": "early_need", "late": "late_need"})
    listed = CliRunner().invoke(mx, ["bench", "--help"])
    assert listed.exit_code == 0, listed.output
    assert "early" in listed.output
    for name in ("early", "late"):
        ran = CliRunner().invoke(mx, ["bench", name, *(["--rounds", "3"] if name == "early" else [])])
        assert ran.exit_code == 2
        [line] = ran.output.strip().splitlines()
        assert said in line
        assert f"mx bench {name} " in line
