"""docs/how-to/kubernetes.md, run-a-server.md, migrate.md: their commands run as they stand there, or say why not."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2
from tests.deploy.test_kubernetes import ROOT
from tests.web.conftest import READY, WebServer, identity, publish, start_web
from tools.render_manifests import helm

__all__ = ["start_web"]  # a fixture

NAMES = ("kubernetes.md", "run-a-server.md", "migrate.md")
PAGES = {name: (ROOT / "docs" / "how-to" / name).read_text() for name in NAMES}
SERVER = "localhost:8001"
STATE = "/var/lib/mxserver"


def commands(page: str) -> Iterator[tuple[str, str]]:
    """Each command, and why it is not run."""
    for block in re.findall(r"^( *)```sh\n(.*?)^\1```", page.replace("4. ```sh", "   ```sh"), re.MULTILINE | re.DOTALL):
        for line in block[1].splitlines():
            command, _, why = line.strip().partition("  # not run: ")
            yield command, why


COMMANDS = list(dict.fromkeys(one for page in PAGES.values() for one in commands(page)))
RUN = [command for command, why in COMMANDS if not why]


def test_what_is_not_run_could_not_be_run_here() -> None:
    assert len(COMMANDS) > 20
    assert all(len(list(commands(page))) >= 5 for page in PAGES.values())
    for command, why in COMMANDS:
        if why:
            assert re.match(r"(helm (install|test|upgrade)|kubectl|docker) ", command), command
            assert re.match(r"no (cluster|Docker daemon)|the same", why), why


def test_files_and_values_that_are_named_exist() -> None:
    for path in set(re.findall(r"(?<![\w/])deploy/[\w./-]+\w", "".join(PAGES.values()))):
        assert (ROOT / path).exists(), path


def ran(command: str, folder: Path, server: str = "") -> str:
    """What it prints; with this environment's programs, and the address and the folder of this test."""
    words = [word.replace(SERVER, server) for word in shlex.split(command)]
    words = [word.replace(STATE, str(folder / "state")) for word in words]
    words = [str(folder / word) if word == "backup.tar" else word for word in words]
    beside = Path(sys.executable).parent
    path = f"{beside}{os.pathsep}{os.environ['PATH']}"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MX_", "MODEL_EXPRESS_"))}
    done = subprocess.run(
        words, cwd=ROOT, env={**plain, "PATH": path}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.parametrize("command", [one for one in RUN if one.split()[0] in ("helm", "promtool", "mxserver")])
def test_command_runs(command: str, tmp_path: Path) -> None:
    program = command.split()[0]
    if program == "helm" and not helm().exists():
        pytest.skip("no helm: tools/get_helm.py had no network, or no x86-64")
    if program == "promtool" and shutil.which(program) is None:
        pytest.skip("no promtool: tools/install_test_packages.sh installs Debian's prometheus")
    said = ran(command, tmp_path)
    assert "kind: Deployment" in said or "template" not in command


def records(server: WebServer) -> list[p2p_pb2.SourceInstanceRef]:
    with ServerClient(server.address) as client:
        return list(client.list_sources())


def test_commands_of_mx_and_a_backup_that_is_put_back(start_web: Callable[..., WebServer], tmp_path: Path) -> None:
    path = tmp_path / "state" / "state.sqlite3"
    server = start_web("--store-path", str(path))
    with ServerClient(server.address) as client:
        publish(client, "w", READY, of=identity("org/model"))
    asked = [command for command in RUN if command.startswith("mx ")]
    assert {command.split()[1] for command in asked} == {"status", "sources"}
    for command in asked:
        assert "org/model" in ran(command, tmp_path, server.address)
    server.close()
    save, restore = (command for command in RUN if command.startswith("tar "))
    ran(save, tmp_path)
    for file in path.parent.iterdir():
        file.unlink()
    lost = start_web("--store-path", str(path))
    assert records(lost) == []
    lost.close()
    for file in path.parent.iterdir():
        file.unlink()
    ran(restore, tmp_path)
    assert [one.model_name for one in records(start_web("--store-path", str(path)))] == ["org/model"]


def test_every_command_is_run_by_one_of_these() -> None:
    assert {command.split()[0] for command in RUN} == {"helm", "promtool", "mxserver", "mx", "tar"}
