"""Runs a server as a kubelet would: a program for root in namespaces of its own (`unshare --mount --net --pid --fork`).

Its input is JSON: `root` (the checkout), `python` (where the interpreter is installed), `uid`, `gid`, `group`
(fsGroup), `environment`, `arguments`, `mounts` (paths of volumes, as emptyDir has them), `probes` (paths of the port
9401). With `image`, a root file system, its `program` starts there instead of the checkout's server, with `binds` of
this machine's folders, and the commands of `beside` once the probes answer. Its output: what the probes and the
programs answered. Nothing of the machine is changed: all mounts are this namespace's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

START_SECONDS = 60.0


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def loopback_up() -> None:
    request = struct.pack("16sH14s", b"lo", 0x1 | 0x40, b"")  # IFF_UP, IFF_RUNNING
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS


def prepare(root: str, python: str, mounts: list[str], group: int) -> str:
    """The volumes as the chart mounts them, everything else of the root's file system read-only; where the code is."""
    mount("--make-rprivate", "/")
    loopback_up()
    mount("-t", "tmpfs", "-o", "mode=755", "none", "/var")  # the image has these folders, this machine has not
    code = Path("/var/code")
    for path in (code, Path("/var/python"), *map(Path, mounts)):
        path.mkdir(parents=True, exist_ok=True)
    for source, at in ((root, "/var/code"), (python, "/var/python")):  # they may lie where root alone may look
        mount("--bind", source, at)
    for path in mounts:
        mount("-t", "tmpfs", "-o", f"mode=2777,gid={group}", "none", path)
    mount("-o", "remount,ro", "/var")
    mount("-o", "remount,bind,ro", str(code))
    mount("-o", "remount,bind,ro", "/")
    return str(code)


def prepare_image(image: str, mounts: list[str], group: int, binds: dict[str, str]) -> None:
    """A root file system as a pod sees it: read-only but for its volumes and /tmp."""
    mount("--make-rprivate", "/")
    loopback_up()
    mount("--bind", image, image)
    mount("-t", "proc", "none", f"{image}/proc")
    mount("--rbind", "/dev", f"{image}/dev")
    for source, at in binds.items():
        mount("--bind", source, image + at)
        mount("-o", "remount,bind,ro", image + at)
    for path in mounts:
        mount("-t", "tmpfs", "-o", f"mode=2777,gid={group}", "none", image + path)
    mount("-o", "remount,bind,ro", image)


def as_user(command: dict[str, Any]) -> list[str]:
    """What takes root and its capabilities away."""
    return [
        *("setpriv", "--reuid", str(command["uid"]), "--regid", str(command["gid"])),
        *("--groups", str(command["group"]), "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"),
        *("env", "-i", "-C", "/"),
    ]


def in_checkout(command: dict[str, Any]) -> list[str]:
    """The server of this checkout, with the packages that it has."""
    code = prepare(command["root"], command["python"], command["mounts"], command["group"])
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = f"{code}/.venv/lib/{version}/site-packages"
    environment = [f"{name}={value}" for name, value in command["environment"].items()]
    places = [f"PYTHONPATH={code}:{packages}", "LD_LIBRARY_PATH=/var/python/lib", "PYTHONDONTWRITEBYTECODE=1"]
    return [*as_user(command), *places, *environment, f"/var/python/bin/{version}", "-m", "mxserver"]


def answer(path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:9401{path}", timeout=60) as got:
            return int(got.status)
    except urllib.error.HTTPError as error:
        return error.code


def main(command: dict[str, Any]) -> dict[str, Any]:
    place = command.get("image", "")
    if place:
        prepare_image(place, command["mounts"], command["group"], command.get("binds", {}))
        environment = [f"{name}={value}" for name, value in command["environment"].items()]
        inside = ["chroot", place, *as_user(command), *environment]
        words = [*inside, *command["program"]]
    else:
        inside, words = [], in_checkout(command)
    server = subprocess.Popen([*words, *command["arguments"]], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + START_SECONDS
    answers: dict[str, int] = {}
    while server.poll() is None and time.monotonic() < deadline and answers != dict.fromkeys(command["probes"], 200):
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            answers = {path: answer(path) for path in command["probes"]}
    status = Path(f"/proc/{server.pid}/status").read_text() if server.poll() is None else ""
    beside = [
        subprocess.run([*inside, *words], capture_output=True, text=True, check=False)
        for words in (command.get("beside", []) if server.poll() is None else [])
    ]
    server.terminate()
    said = server.communicate()[1]
    written = sorted(str(path) for at in command["mounts"] for path in Path(place + at).rglob("*") if path.is_file())
    return {
        "answers": answers,
        "code": server.returncode,
        "said": said,
        "written": written,
        "status": status,
        "beside": [{"code": one.returncode, "out": one.stdout, "err": one.stderr} for one in beside],
    }


if __name__ == "__main__":
    assert os.getpid() == 1, "in a namespace of processes of its own"
    json.dump(main(json.load(sys.stdin)), sys.stdout)
