"""`make test-aarch64`: the core, compiled for aarch64, passes its tests under qemu-user. Needs Debian's apt, not root.

zig compiles (tools/make_wheel.py). Debian's arm64 Python, its C library and qemu are downloaded and unpacked below
build/aarch64, never installed; PyPI's aarch64 wheels lie beside. Emulation is slow, and says nothing about speed: what
is shown is that the code compiles, that NEON and the plain loops give the digests of x86_64, and that the rest does
not depend on the processor.

    python tools/aarch64.py [pytest arguments; tests/core without]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.make_wheel import WheelError, for_aarch64, install_tools, run  # noqa: E402

PLACE = ROOT / "build" / "aarch64"
SYSTEM = PLACE / "system"  # Debian's arm64
QEMU = PLACE / "qemu" / "usr" / "bin" / "qemu-aarch64-static"
TREE, SITE, HEADERS, PYTHON = PLACE / "tree", PLACE / "site", PLACE / "headers", PLACE / "python"
VERSION = "3.11"  # Debian 12's Python
PACKAGES = (f"python{VERSION}", f"libpython{VERSION}-dev", "libstdc++6")  # the last is numpy's
TESTED = ("pytest", "pytest-timeout", "pytest-instafail", "pytest-split", "pytest-xdist", "hypothesis", "numpy")
TESTED += ("safetensors", "cryptography", "mx-modelexpress")
LEFT_OUT = {
    "tests/core/process/test_attached_memory.py": "qemu-user says ENOSYS to process_vm_readv",
    "tests/core/safetensors/test_safetensors_properties.py": "it imports torch, which takes minutes there",
    "tests/core/memory/test_host_buffer.py": "so does it",
    "tests/core/test_package.py": "it looks at the tree and its builds, not at the processor",
}


def get_system() -> None:
    """Debian's packages, unpacked once. Raises WheelError."""
    complete = PLACE / "complete"
    if complete.exists():
        return
    for folder in (SYSTEM, QEMU.parents[2], PLACE / "apt"):
        shutil.rmtree(folder, ignore_errors=True)
    lists, archives = PLACE / "apt" / "lists" / "partial", PLACE / "apt" / "archives" / "partial"
    for folder in (lists, archives):
        folder.mkdir(parents=True)
    status, configuration = PLACE / "apt" / "status", PLACE / "apt" / "apt.conf"
    status.touch()
    configuration.write_text(
        'APT::Architecture "arm64";\nAPT::Architectures {"arm64";};\n'
        f'Dir::State "{PLACE}/apt";\nDir::State::status "{status}";\nDir::Cache "{PLACE}/apt";\n'
    )
    arm = {"APT_CONFIG": str(configuration)}
    run("apt-get", "update", "-qq", environ=arm)
    said = run("apt-get", "--simulate", "install", "--no-install-recommends", *PACKAGES, environ=arm)
    names = re.findall(r"^Inst (\S+)", said, re.MULTILINE)
    print(f"downloading {len(names)} packages of Debian arm64, and qemu-user-static", flush=True)
    for folder, environ, wanted in ((SYSTEM, arm, names), (QEMU.parents[2], {}, ["qemu-user-static"])):
        packages = PLACE / "apt" / folder.name
        packages.mkdir()
        run("apt-get", "download", *wanted, environ=environ, cwd=packages)
        for package in sorted(packages.glob("*.deb")):
            run("dpkg", "-x", package, folder)
    for part in (f"python{VERSION}", f"aarch64-linux-gnu/python{VERSION}"):
        shutil.copytree(SYSTEM / "usr" / "include" / part, HEADERS / part, dirs_exist_ok=True)
    complete.touch()


def pinned(names: list[str]) -> list[str]:
    """These packages and what they need, in this environment's versions."""
    found: dict[str, str] = {}
    while names:
        name = names.pop()
        if name in found:
            continue
        try:
            found[name] = f"{name}=={version(name)}"
        except PackageNotFoundError:
            continue
        wanted = [Requirement(text) for text in requires(name) or ()]
        names += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return sorted(pin for name, pin in found.items() if name != "mx-modelexpress")


def get_packages() -> None:
    """PyPI's wheels for that machine. Raises WheelError."""
    mark, pins = SITE / "installed.txt", pinned(list(TESTED))
    if mark.exists() and mark.read_text().split("\n") == pins:
        return
    shutil.rmtree(SITE, ignore_errors=True)
    platforms = [word for tag in ("2_28", "2_17") for word in ("--platform", f"manylinux_{tag}_aarch64")]
    command = (sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--only-binary", ":all:", "--target", SITE)
    platforms += ["--python-version", VERSION, "--implementation", "cp", "--abi", f"cp{VERSION.replace('.', '')}"]
    run(*command, *platforms, "--abi", "abi3", "--abi", "none", *pins)
    mark.write_text("\n".join(pins))


def compile_core() -> None:
    """The packages with their modules for aarch64, and the tests beside them. Raises WheelError."""
    install_tools()
    environ = for_aarch64(HEADERS)
    environ["CFLAGS"] += " -O1"
    run(sys.executable, "setup.py", "-q", "build", "--build-base", PLACE / "base", "--build-lib", TREE, environ=environ)
    for name in ("tests", "bench", "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, TREE / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copy2(ROOT / name, TREE / name)


def write_python() -> None:
    """A program that is that machine's Python, for the tests' own child processes too."""
    PYTHON.write_text(
        "#!/bin/sh\n"
        f"PYTHONHOME={SYSTEM}/usr PYTHONPATH={TREE}:{SITE} PYTHONDONTWRITEBYTECODE=1 "
        f'exec {QEMU} -L {SYSTEM} -0 {PYTHON} {SYSTEM}/usr/bin/python{VERSION} "$@"\n'
    )
    PYTHON.chmod(0o755)


def main() -> int:
    """pytest's status."""
    PLACE.mkdir(parents=True, exist_ok=True)
    try:
        get_system()
        get_packages()
        compile_core()
    except WheelError as error:
        sys.exit(f"make test-aarch64: {error}")
    write_python()
    for test, reason in LEFT_OUT.items():
        print(f"left out: {test}: {reason}")
    arguments = sys.argv[1:] or ["tests/core"]
    left_out = [f"--ignore={test}" for test in LEFT_OUT]
    command = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", *left_out, *arguments]
    names = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, cwd=TREE, env=names, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
