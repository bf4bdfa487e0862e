"""Makes mxcore/cuda/cuda_kernels.ptx of the .cu: text that every driver since CUDA 11 compiles for the GPU it finds.

    python tools/make_ptx.py            writes it; needs nvcc and ptxas
    python tools/make_ptx.py --check    exit code 1 if the file is not what the sources make, or does not assemble

nvcc stamps its own PTX version on what it makes, which older drivers refuse although nothing in it is new. So the stamp
becomes the oldest version that has all we use, and ptxas, which knows what each version has, assembles the result for
every architecture that it knows from sm_75 on.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "mxcore" / "cuda" / "cuda_kernels.cu"
TARGET = SOURCE.with_suffix(".ptx")
PTX_VERSION = "7.0"  # CUDA 11.0
ARCHITECTURE = "75"  # the oldest one of nvcc 13
HEADER = """//
// Made by tools/make_ptx.py of cuda_kernels.cu; do not edit.
//
"""


def made() -> str:
    """The PTX of the sources as they are."""
    command = [
        "nvcc",
        "-ptx",
        "-O3",
        f"-arch=compute_{ARCHITECTURE}",
        "-I",
        str(ROOT / "mxcore"),
        str(SOURCE),
        "-o",
        "-",
    ]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    code = text[text.index(".version") :]
    code = re.sub(r"^\.version .*$", f".version {PTX_VERSION}", code, count=1, flags=re.MULTILINE)
    return HEADER + re.sub(r"^\s*//.*\n", "", code, flags=re.MULTILINE).rstrip() + "\n"


def architectures() -> list[str]:
    """What this ptxas can make code for, from the file's own architecture on."""
    listed = subprocess.run(["nvcc", "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    return [name for name in listed if int(re.sub(r"\D", "", name)) >= int(ARCHITECTURE)]


def assemble(text: str) -> list[str]:
    """ptxas on the text for all architectures; what it said of registers and spills. CalledProcessError if it fails."""
    said = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernels.ptx"
        source.write_text(text)
        for architecture in architectures():
            command = ["ptxas", "-v", "--warning-as-error", f"-arch={architecture}", str(source), "-o", f"{folder}/out"]
            ran = subprocess.run(command, check=True, capture_output=True, text=True)
            used = re.findall(r"Used (\d+) registers", ran.stderr)
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", ran.stderr)))
            said.append(f"{architecture}: {'/'.join(used)} registers, {spilled} bytes spilled")
    return said


def main() -> int:
    """Writes or checks."""
    text = made()
    print(*assemble(text), sep="\n")
    if "--check" in sys.argv[1:]:
        same = TARGET.is_file() and TARGET.read_text() == text
        print(f"{TARGET.name} is {'' if same else 'not '}what the sources make")
        return 0 if same else 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
