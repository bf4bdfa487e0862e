"""The shell commands of a page in docs/, and a shell that runs them, with a network and processes of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

_BLOCK = re.compile(r"^( *)```sh\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_LEFT_OUT = re.compile(r"# (?:run by (?P<test>\S+)|not run (?:here|by the test): (?P<reason>.+))")


def blocks(page: Path) -> list[str]:
    """The page's blocks of shell commands, in order."""
    return [textwrap.dedent(body) for _, body in _BLOCK.findall(page.read_text())]


def left_out(block: str) -> re.Match[str] | None:
    """What the block's first line says of why nobody runs it as it stands: `test` runs the same, or a `reason`."""
    return _LEFT_OUT.match(block)


def run(page: Path, folder: Path, *, seconds: float) -> subprocess.CompletedProcess[str]:
    """Runs the page's commands in `folder`, one shell for all, where nothing of this machine's network is seen.

    Ends with all that they started. The first command that fails ends it.
    """
    commands = "\n".join(block for block in blocks(page) if left_out(block) is None)
    private = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    private += [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    names = {name: value for name, value in os.environ.items() if not name.startswith(("MX_", "MODEL_EXPRESS_"))}
    path = f"{Path(sys.executable).parent}:{names.get('PATH', '')}"
    return subprocess.run(
        [*private, "bash", "-euo", "pipefail", "-c", f"ip link set lo up\n{commands}"],
        cwd=folder,
        env={**names, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
