"""Does what the images' Dockerfiles do, in chroots of Debian: `make test-images`, or python -m tools.image_chroot.

No Docker daemon runs where this is developed. debootstrap makes the base (Debian 12, whose Python is that of the base
images), and each instruction of a Dockerfile that matters is carried out there: RUN by chroot, COPY of what the
.dockerignore lets through, ENV, ARG, USER. Then the server's entry point starts as its user, and the plugin is imported
beside a real vLLM, which the worker's base takes from this checkout's environment. Needs root, apt and the network.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "deploy" / "images"
RELEASE = "bookworm"
PACKAGES = "python3,python3-venv,python3-dev,python3-pip,ca-certificates,libnuma1,libgomp1,libstdc++6"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
START_SECONDS = 60.0
THEIRS = "/opt/environment"


def say(text: str) -> None:
    print(text, flush=True)


def made_base(folder: Path) -> None:
    """A minimal Debian with Python, as the base images have it. Raises CalledProcessError."""
    if shutil.which("debootstrap") is None:
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "debootstrap"], check=True)
    say(f"debootstrap {RELEASE}")
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.copy("/etc/resolv.conf", folder / "etc" / "resolv.conf")
    shutil.copy(CERTIFICATES, folder / "etc/ssl/certs/ca-certificates.crt")  # whom this machine trusts
    (folder / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink(missing_ok=True)  # the images' Python is not Debian's


@contextmanager
def mounted(stage: Path, *binds: tuple[Path, str]) -> Iterator[None]:
    """With /proc and /dev, and folders of this machine at paths of the stage, read-only."""
    at = [(Path("/proc"), "proc"), (Path("/dev"), "dev"), *binds]
    done: list[Path] = []
    try:
        for source, path in at:
            target = stage / path.lstrip("/")
            target.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--rbind", str(source), str(target)], check=True)
            subprocess.run(["mount", "--make-rslave", str(target)], check=True)
            done.append(target)
        yield
    finally:
        for target in reversed(done):
            subprocess.run(["umount", "-R", "-l", str(target)], check=True)


class Stage:
    """One stage: its files, environment and user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        self.arguments = {"PIP_CERT": str(CERTIFICATES)}
        self.at = "/"
        self.user = "0:0"
        self.entry: list[str] = []

    def inside(self, path: str) -> Path:
        """A path of the stage, as this machine sees it."""
        return self.folder / os.path.join(self.at, path).lstrip("/")  # noqa: PTH118 - paths of the stage

    def run(self, *command: str, user: str | None = None) -> subprocess.Popen[str]:
        """Starts a program in it."""
        names = [f"{name}={value}" for name, value in (self.arguments | self.environment).items()]
        inner = ["env", "-i", "-C", self.at, *names, *command]
        chroot = ["chroot", f"--userspec={user or self.user}", str(self.folder), *inner]
        return subprocess.Popen(chroot, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def done(self, *command: str, user: str | None = None) -> str:
        """What a program says. Raises SystemExit where it fails."""
        process = self.run(*command, user=user)
        said = process.communicate()[0]
        if process.returncode:
            raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}:\n{said[-4000:]}")
        return said


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Instruction and the rest of its line."""
    lines = re.sub(r"\\\n", " ", dockerfile.read_text()).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word and word[0] != "#"]


def context_files(dockerfile: Path) -> list[str]:
    """What git tracks and the .dockerignore lets through."""
    rules = dockerfile.with_name(dockerfile.name + ".dockerignore").read_text().split()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    let_through = [rule[1:] for rule in rules if rule.startswith("!")]
    kept_out = [rule for rule in rules if rule.startswith("**/")]
    return [
        file
        for file in tracked
        if any(file == rule or file.startswith(f"{rule}/") for rule in let_through)
        and not any(fnmatch.fnmatch(f"/{file}", rule[2:]) or fnmatch.fnmatch(file, rule[3:]) for rule in kept_out)
    ]


def copy(stage: Stage, rest: str, stages: dict[str, Stage], files: list[str]) -> None:
    """COPY, of files or folders."""
    words = rest.split()
    origin = ROOT
    if words[0].startswith("--from="):
        origin = stages[words.pop(0).partition("=")[2]].folder
    *sources, target = words
    for source in sources:
        to = stage.inside(target)
        if origin is not ROOT:
            shutil.copytree(origin / source.lstrip("/"), to, symlinks=True, dirs_exist_ok=True)
            continue
        for file in [file for file in files if source == "." or file == source or file.startswith(f"{source}/")]:
            place = to / (
                file if source == "." else os.path.relpath(file, source) if file != source else Path(file).name
            )
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, place)


def copied(folder: Path, to: Path) -> None:
    """With devices and owners, as they are."""
    subprocess.run(["cp", "-a", str(folder), str(to)], check=True)


def built(dockerfile: Path, bases: dict[str, Path], work: Path, *binds: tuple[Path, str]) -> Stage:
    """The last stage. `bases`: a chroot for each variable that FROM names; `binds` are mounted while it runs."""
    files, stages = context_files(dockerfile), dict[str, Stage]()
    stage = Stage(work)
    for word, rest in instructions(dockerfile):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            folder = work / f"{dockerfile.stem}-{name or 'final'}"
            copied(bases[base], folder)
            stage = stages[name or "final"] = Stage(folder)
        elif word == "RUN":
            say(f"{dockerfile.name}: RUN {rest[:100]}")
            with mounted(stage.folder, *binds):
                stage.done("sh", "-c", rest, user=stage.user)
        elif word == "COPY":
            copy(stage, rest, stages, files)
        elif word == "WORKDIR":
            stage.at = rest
            stage.inside(".").mkdir(parents=True, exist_ok=True)
        elif word == "ENV":
            for pair in shlex.split(rest):
                name, _, value = pair.partition("=")
                stage.environment[name] = value.replace("$PATH", stage.environment["PATH"])
        elif word == "ARG" and "=" in rest:
            stage.arguments[rest.partition("=")[0]] = rest.partition("=")[2]
        elif word == "USER":
            stage.user = "0:0" if rest == "root" else rest
        elif word == "ENTRYPOINT":
            stage.entry = re.findall(r'"(.*?)"', rest)
    stage.at = "/"
    return stage


def check_server(stage: Stage) -> None:
    """It starts as its user, answers and ends; no compiler, no torch, no pip are there."""
    say("the server starts as its user")
    process = stage.run(*stage.entry, "--host", "127.0.0.1", "--port", "0")
    lines: list[str] = []
    deadline = time.monotonic() + START_SECONDS
    for line in process.stdout or ():
        lines.append(line)
        if "listening on" in line or time.monotonic() > deadline:
            break
    process.terminate()
    said = "".join([*lines, process.communicate()[0]])
    if process.returncode or "listening on" not in said:
        raise SystemExit(f"the server ended with {process.returncode}:\n{said}")
    for absent in ("import torch", "import pip", "import nixl"):
        if stage.run("/opt/mx/bin/python", "-c", absent).wait() == 0:
            raise SystemExit(f"{absent} works in the server's image")
    if shutil.which("gcc", path=str(stage.folder / "usr/bin")):
        raise SystemExit("the server's image has a compiler")
    stage.done(*stage.entry, "--check-config")
    stage.done("mx", "--version")


def check_worker(stage: Stage) -> None:
    """As its user vLLM finds our load format, and the compiled core works."""
    say("vLLM finds the load format in the worker's image")
    code = (
        "import importlib.metadata as m; from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as f; import mxcore.digest; "
        "print(f['mx'].__module__, m.version('mx-modelexpress'))"
    )
    said = stage.done("python3", "-c", code)
    if "vllm_plugin" not in said:
        raise SystemExit(f"the load format mx is not ours:\n{said}")
    say(said.splitlines()[-1])


def with_vllm(stage: Path, packages: Path) -> None:
    """vLLM is among Python's packages there: here links to those of this checkout's environment, without ours."""
    for entry in packages.iterdir():
        if not entry.name.startswith(("mx_modelexpress", "__editable__", "__pycache__")) and entry.suffix != ".pth":
            link = stage / "usr/local/lib/python3.11/dist-packages" / entry.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists() and not link.is_symlink():
                link.symlink_to(f"{THEIRS}/{entry.name}")


def main() -> None:
    if os.geteuid():
        raise SystemExit("chroots need root")
    environment = ROOT / ".venv"
    packages = next((environment / "lib").glob("python3.*/site-packages"))
    with tempfile.TemporaryDirectory(prefix="mx-images-") as place:
        work = Path(place)
        base, vllm = work / "base", work / "vllm"
        made_base(base)
        copied(base, vllm)
        with_vllm(vllm, packages)
        stage = built(IMAGES / "server.Dockerfile", {"${BASE}": base}, work)
        with mounted(stage.folder):
            check_server(stage)
        bind = (packages, THEIRS)
        stage = built(IMAGES / "worker.Dockerfile", {"${BASE}": base, "${VLLM_IMAGE}": vllm}, work, bind)
        with mounted(stage.folder, bind):
            check_worker(stage)
    say("the images' RUN lines work, the server starts, vLLM finds the load format")


if __name__ == "__main__":
    sys.exit(main())
