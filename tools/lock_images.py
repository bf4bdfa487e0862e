"""Makes the lock files of deploy/images: exact versions with the hashes of all their files, by uv.

    python tools/lock_images.py                 all three
    python tools/lock_images.py worker NAME==VERSION...   the worker's alone, for an image that has these versions

`server/requirements.lock` is what the package and its extra `server` need, `worker/requirements.lock` what vLLM's
images do not bring, beside what requirements/vllm-cpu.txt has of gRPC and protobuf (with --no-deps: nothing of the
image is replaced), `build.lock` what builds the wheel. A test holds the files to what pyproject.toml asks for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "deploy" / "images"
PLACE = ROOT / "build" / "lock"
UV = "uv==0.13.8"
PYTHON = "3.11"  # Debian's in the server's image, and the oldest that is supported
WORKER = ("grpcio-health-checking", "xxhash")  # no requirement of vLLM's has them
BESIDE = ("grpcio", "protobuf")  # of vLLM's, which the first of these has to fit


def server_requirements() -> list[str]:
    """What the server's image installs, as pyproject.toml says it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["server"]]


def worker_requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [line for line in project["dependencies"] if re.split(r"[<>=]", line)[0] in WORKER]


def build_requirements() -> list[str]:
    required: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    return required


def versions_beside() -> list[str]:
    """What vLLM's own requirements have here."""
    lines = (ROOT / "requirements" / "vllm-cpu.txt").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0] in BESIDE]


def uv() -> Path:
    program = PLACE / "bin" / "uv"
    if not program.exists():
        venv.create(PLACE, with_pip=True)
        subprocess.run([PLACE / "bin" / "python", "-m", "pip", "install", "-qq", UV], check=True)
    return program


def lock(requirements: Sequence[str], title: str, beside: Sequence[str] = ()) -> str:
    """The text of a lock file; `beside` are exact versions that are there already, and are not in it."""
    PLACE.mkdir(parents=True, exist_ok=True)
    (PLACE / "pyproject.in").write_text("".join(f"{line}\n" for line in requirements))
    (PLACE / "beside.in").write_text("".join(f"{line}\n" for line in beside))
    command = [uv(), "pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--only-binary", ":all:"]
    command += ["--python-version", PYTHON, "--python-platform", "x86_64-manylinux_2_28", "--no-config"]
    command += ["--constraints", "beside.in", *(["--no-deps"] if beside else []), "pyproject.in"]
    made = subprocess.run(command, cwd=PLACE, capture_output=True, text=True, check=False)
    if made.returncode:
        sys.exit(f"lock_images: {made.stderr}")
    return f"# {title} Made by tools/lock_images.py.\n{made.stdout}"


def main(words: Sequence[str]) -> None:
    beside = list(words[1:]) or versions_beside()
    if not words:
        title = "What the package and its extra `server` need."
        (IMAGES / "server" / "requirements.lock").write_text(lock(server_requirements(), title))
        (IMAGES / "build.lock").write_text(lock(build_requirements(), "What builds the package's wheel."))
    elif words[0] != "worker":
        sys.exit(__doc__)
    title = f"What a vLLM image with {', '.join(beside)} does not bring."
    (IMAGES / "worker" / "requirements.lock").write_text(lock(worker_requirements(), title, beside))


if __name__ == "__main__":
    main(sys.argv[1:])
