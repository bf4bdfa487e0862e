"""Builds the wheel that an index takes, into dist/: `make wheel`, or python tools/make_wheel.py [FOLDER].

Compiled by this machine's compiler from what git tracks, and linked by zig (PyPI's ziglang) against glibc 2.28, which
is in no Debian that has a compiler for this code: so it runs wherever NIXL's and numpy's wheels do. auditwheel gives it
the tag of what its binaries need, abi3audit finds what is not of the stable ABI, twine what an index would refuse.

`for_aarch64` compiles by zig too, for `make test-aarch64`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "wheel"
TOOLS = PLACE / "tools"
REQUIREMENTS = ROOT / "requirements" / "wheel.txt"
GLIBC = "2.28"  # fcntl64, the newest symbol in use, came with it


class WheelError(Exception):
    """A step failed; the message says which, and what it said."""


def run(*command: str | Path, environ: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
    """What a program prints. Raises WheelError."""
    path = f"{TOOLS / 'bin'}{os.pathsep}{os.environ['PATH']}"
    names = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(environ or {}), "PATH": path}
    names.pop("PYTHONPATH", None)
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=names, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WheelError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def install_tools() -> None:
    """Once for each state of the requirements. Raises WheelError."""
    wanted, mark = REQUIREMENTS.read_text(), TOOLS / "installed.txt"
    if mark.exists() and mark.read_text() == wanted:
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    venv.create(TOOLS, with_pip=True)
    run(TOOLS / "bin" / "python", "-m", "pip", "install", "-qq", "--no-deps", "-r", REQUIREMENTS)
    mark.write_text(wanted)


def copy_tree(tree: Path) -> None:
    """What git tracks, as it is in the working tree: no module of this tree's own builds, no file that git ignores.

    Raises WheelError where the packages have files that git was not told of: the wheel would lack them.
    """
    others = run(
        "git", "ls-files", "--others", "--exclude-standard", "mxcore", "mxserver", "vllm_plugin", "bench/mxbench"
    ).split()
    if others:
        raise WheelError(f"git does not track {others[0]} (and {len(others) - 1} more): add it, or remove it")
    shutil.rmtree(tree, ignore_errors=True)
    for name in filter(None, run("git", "ls-files", "-z").split("\0")):
        source, copy = ROOT / name, tree / name
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


def zig(machine: str) -> str:
    """zig as a C compiler and linker for glibc 2.28 of a machine."""
    [program] = TOOLS.glob("lib/python*/site-packages/ziglang/zig")
    return f"{program} cc -target {machine}-linux-gnu.{GLIBC}"


def for_this_machine() -> dict[str, str]:
    """The environment of setup.py. libgcc finds out what the processor has, when it is loaded; zig's own does not."""
    libgcc = run(*(os.environ.get("CC") or "cc").split(), "-print-libgcc-file-name").strip()
    return {"LDSHARED": f"{zig(platform.machine())} -shared {libgcc}", **_zig_cache()}


def for_aarch64(headers: Path) -> dict[str, str]:
    """The same, with a folder of that machine's Python headers."""
    compiler = zig("aarch64")
    return {
        "CC": compiler,
        "CFLAGS": f"-I{headers}/python3.11 -I{headers}",
        "LDSHARED": f"{compiler} -shared",
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        **_zig_cache(),
    }


def _zig_cache() -> dict[str, str]:
    return {"ZIG_GLOBAL_CACHE_DIR": str(PLACE / "zig-cache"), "ZIG_LOCAL_CACHE_DIR": str(PLACE / "zig-cache")}


def build(folder: Path, environ: Mapping[str, str], machine: str) -> Path:
    """The wheel in `folder`, with the tag that its binaries allow. Raises WheelError."""
    tree, built = folder / "tree", folder / "built"
    copy_tree(tree)
    shutil.rmtree(built, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", built, tree, environ=environ, cwd=folder)
    [wheel] = built.glob("*.whl")
    shutil.rmtree(folder / "repaired", ignore_errors=True)
    tag = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
    run("auditwheel", "repair", "--plat", tag, "--only-plat", "-w", folder / "repaired", wheel)
    [repaired] = (folder / "repaired").glob("*.whl")
    return repaired


def check(wheel: Path) -> None:
    """Raises WheelError for a symbol that is not of the stable ABI, and for what an index would refuse."""
    run("abi3audit", "--strict", "--summary", wheel)
    run("twine", "check", "--strict", wheel)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else PLACE
    folder.mkdir(parents=True, exist_ok=True)
    try:
        install_tools()
        wheel = build(folder, for_this_machine(), platform.machine())
        check(wheel)
    except WheelError as error:
        sys.exit(f"make wheel: {error}")
    place = ROOT / "dist" / wheel.name if folder == PLACE else folder / wheel.name
    place.parent.mkdir(exist_ok=True)
    shutil.copy2(wheel, place)
    print(f"{place}: {place.stat().st_size} bytes")


if __name__ == "__main__":
    main()
