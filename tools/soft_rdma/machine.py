"""QEMU: its arguments, and one run under a time limit."""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tools.soft_rdma.errors import SoftRdmaError

__all__ = ["qemu_arguments", "run_machine", "status_of"]

_BOOT_NOISE = re.compile(rb"\x1b\[[?0-9;]*[a-zA-Z]|\x1bc|\r")
_KERNEL_LINE = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"  # it fails on a busy host, and panics


def qemu_arguments(
    kernel: Path, initramfs: Path, status: Path, *, memory_mib: int, firmware: Sequence[Path]
) -> list[str]:
    """The machine: emulated, two processors, the host's root read-only, two serial lines (console, status), no disk.

    Its processor is x86-64-v2. QEMU emulates AVX since 7.2 only; with all that 7.2 can (`-cpu max`) two of twelve boots
    went wrong: a program's system call got an argument that it had not given, new threads spun before their first line.
    """
    return [
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "Westmere", "-smp", "2", "-m", f"{memory_mib}M"),
        *("-nodefaults", "-display", "none", "-no-reboot", "-monitor", "none"),
        *("-serial", "stdio", "-serial", f"file:{status}"),
        *("-kernel", str(kernel), "-initrd", str(initramfs), "-append", _KERNEL_LINE),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
        *(argument for folder in firmware for argument in ("-L", str(folder))),
    ]


def run_machine(command: Sequence[str], environment: dict[str, str], console: Path, limit_seconds: float) -> None:
    """Runs it to its end; what the console says goes to stdout and, whole, to the file `console`.

    Raises SoftRdmaError: the time is over (the machine is then gone), or QEMU itself failed.
    """
    deadline = time.monotonic() + limit_seconds
    with (
        console.open("wb") as log,
        subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as machine,
    ):
        assert machine.stdout is not None  # noqa: S101 - a pipe
        try:
            _copy(machine.stdout, log, deadline)
            code = machine.wait(max(1.0, deadline - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise SoftRdmaError(f"the machine was ended after {limit_seconds:g} s; its console: {console}") from error
        finally:
            machine.kill()
    if code != 0:
        raise SoftRdmaError(f"QEMU ended with {code}; its console: {console}")


def status_of(file: Path) -> int:
    """The exit status that the guest wrote to its second serial line. Raises SoftRdmaError without one."""
    text = file.read_text(errors="replace").strip() if file.exists() else ""
    if not text.isdigit():
        raise SoftRdmaError("the guest ended without an exit status: see its console, above")
    return int(text)


def _copy(source: IO[bytes], log: IO[bytes], deadline: float) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if not selector.select(left):
                continue
            data = os.read(source.fileno(), 65536)
            if not data:
                return
            log.write(data)
            sys.stdout.buffer.write(_BOOT_NOISE.sub(b"", data))
            sys.stdout.buffer.flush()
