"""Memory of processes of one host under Yama, which restricts it by default on Ubuntu. The machine has Yama."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.rdma
SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
WITHOUT_PTRACE = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")
HOLDER = """
import sys
from mxcore.process.attached_memory import allow_attaching
from mxcore.transfer.route.same_host import ProbeTarget
target = ProbeTarget()
print(target.to_proto().SerializeToString().hex(), flush=True)
for _ in sys.stdin:
    print(allow_attaching(), flush=True)
"""
READER = """
import sys
from mxcore.transfer.route.same_host import can_read
from mxserver.wire.proto import mx_pb2
print(can_read(mx_pb2.SameHostProbe.FromString(bytes.fromhex(sys.argv[1]))))
"""


@pytest.fixture
def scope_of_ubuntu() -> Iterator[None]:
    before = SCOPE.read_text()
    SCOPE.write_text("1")
    yield
    SCOPE.write_text(before)


@pytest.mark.usefixtures("scope_of_ubuntu")
def test_a_holder_lets_others_read_it_where_yama_restricts_that_to_ancestors() -> None:
    with subprocess.Popen(
        [*WITHOUT_PTRACE, sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        probe = holder.stdout.readline().strip()
        assert not read(probe)
        holder.stdin.write("allow\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "True\n"
        assert read(probe)
        holder.stdin.close()


def read(probe: str) -> bool:
    ran = subprocess.run(
        [*WITHOUT_PTRACE, sys.executable, "-c", READER, probe], capture_output=True, text=True, check=True, timeout=300
    )
    return ran.stdout == "True\n"
