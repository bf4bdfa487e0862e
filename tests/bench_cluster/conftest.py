"""Four machines: network namespaces with an OpenSSH server in each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench_cluster.mesh import Mesh

MEGABITS, SLOW_MEGABITS = 200.0, 20.0
SLOW = (1, 3)
START_SECONDS = 30.0


@pytest.fixture(scope="session", autouse=True)
def _needs_root() -> None:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces need root and iproute2")


@pytest.fixture(scope="session")
def mesh() -> Iterator[Mesh]:
    """The link between the second and the fourth carries a tenth."""
    with Mesh(4, MEGABITS, {SLOW: SLOW_MEGABITS}) as made:
        yield made


def _key(file: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    return file


@pytest.fixture(scope="session")
def ssh_config(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """ssh's configuration by which n0 to n3 are reached; a server runs in each."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None:
        pytest.skip("no sshd: Debian's openssh-server is not installed")
    folder = tmp_path_factory.mktemp("ssh")
    folder.chmod(0o700)
    user_key = _key(folder / "user")
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where the server's child has its root
    servers, known, config = [], [], []
    for number in range(mesh.count):
        host_key = _key(folder / f"host{number}")
        server = folder / f"sshd{number}"
        server.write_text(
            f"ListenAddress {mesh.ssh_address(number)}:22\nHostKey {host_key}\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder / 'authorized'}\nStrictModes no\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUseDNS no\n"
        )
        with (folder / f"log{number}").open("wb") as log:
            command = [*mesh.prefix(number), sshd, "-D", "-e", "-f", str(server)]
            servers.append(subprocess.Popen(command, stderr=log))
        known.append(f"{mesh.ssh_address(number)} {(folder / f'host{number}.pub').read_text().rsplit(' ', 1)[0]}")
        config.append(f"Host n{number}\n  HostName {mesh.ssh_address(number)}")
    (folder / "known").write_text("\n".join(known) + "\n")
    options = [f"IdentityFile {user_key}", f"UserKnownHostsFile {folder / 'known'}", "StrictHostKeyChecking yes"]
    config += ["Host *", *(f"  {option}" for option in [*options, "IdentitiesOnly yes", "User root"])]
    (folder / "config").write_text("\n".join(config) + "\n")
    try:
        for number in range(mesh.count):
            _until_it_answers(folder, number)
        yield folder / "config"
    finally:
        for process in servers:
            process.terminate()
            process.wait()


def _until_it_answers(folder: Path, number: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    command = ["ssh", "-F", str(folder / "config"), "-o", "BatchMode=yes", f"n{number}", "true"]
    while (ran := subprocess.run(command, capture_output=True, text=True)).returncode:
        assert time.monotonic() < deadline, ran.stderr + (folder / f"log{number}").read_text()
        time.sleep(0.2)


@pytest.fixture(scope="session")
def hosts_file(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four machines: reached by ssh over one network, by each other over the links."""
    file = tmp_path_factory.mktemp("hosts") / "hosts"
    lines = [f"n{number} python={sys.executable} address={mesh.address(number)}" for number in range(mesh.count)]
    file.write_text("\n".join(lines) + "\n")
    return file
