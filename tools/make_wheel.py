"""Builds the wheel that an index takes, into dist/: `make wheel`.

auditwheel gives it the manylinux tag of what its binaries really need, abi3audit finds what is not of the stable ABI.
Both lie in an environment of their own (requirements/wheel.txt), build/wheel/tools.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "wheel"
TOOLS = PLACE / "tools"


def run(*command: str | Path, path: str = "") -> None:
    names = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}" if path else os.environ["PATH"]}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=names, check=False)
    if done.returncode:
        sys.exit(f"make wheel: {Path(command[0]).name} ended with {done.returncode}")


def install_tools() -> None:
    """Once for each state of the requirements."""
    wanted = (ROOT / "requirements" / "wheel.txt").read_text()
    mark = TOOLS / "installed.txt"
    if mark.exists() and mark.read_text() == wanted:
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    venv.create(TOOLS, with_pip=True)
    run(TOOLS / "bin" / "python", "-m", "pip", "install", "-qq", "--no-deps", "-r", "requirements/wheel.txt")
    mark.write_text(wanted)


def main() -> None:
    install_tools()
    built = PLACE / "built"
    shutil.rmtree(built, ignore_errors=True)
    run(sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", built, ".")
    [wheel] = built.glob("*.whl")
    tools = str(TOOLS / "bin")
    run(TOOLS / "bin" / "auditwheel", "repair", "-w", ROOT / "dist", wheel, path=tools)
    repaired = max((ROOT / "dist").glob("*manylinux*.whl"), key=lambda made: made.stat().st_mtime)
    run(TOOLS / "bin" / "abi3audit", "--strict", "--summary", repaired)
    print(f"{repaired.relative_to(ROOT)}: {repaired.stat().st_size} bytes")


if __name__ == "__main__":
    main()
