"""Makes the kit: what a GPU machine without a network has not got, in a folder of at most 64 MiB with the checkout.

| part | what |
|---|---|
| vllm.tar.xz | vLLM's Python part (`vllm_part`) |
| wheels/ | what engine, plugin and server import, and NIXL's slim one |
| peers/ | loaders to compare with |
| project.tar.xz | this checkout's files, changes that are not committed included, and its compiled core |
| tiny/ | a generated model |
| kit.json | sizes, versions, the commit |
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from mxbench.demo import models
from tools.gpu_vllm import vllm_part
from tools.gpu_vllm.wheels import KitError, download
from tools.slim_nixl import slim

ROOT = Path(__file__).parents[2]
LIMIT_BYTES = 64 << 20  # of all that travels, the checkout included
NIXL = "nixl-cu13==1.5.1"
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
MANIFEST, VLLM, PROJECT = "kit.json", "vllm.tar.xz", "project.tar.xz"


def tracked() -> list[Path]:
    """The checkout's files, without what git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in said.split("\0") if name and (ROOT / name).is_file()]


def compiled() -> list[Path]:
    """The core as `make build` compiled it: stable ABI, so for every CPython from 3.11 on."""
    return sorted(file.relative_to(ROOT) for file in (ROOT / "mxcore").rglob("*.abi3.so"))


def write_project(archive: Path) -> None:
    """The checkout's files, and the compiled core without debug information. Raises KitError where it is none."""
    if len(compiled()) != sum(1 for name in tracked() if name.suffix == ".pyx"):
        raise KitError("the core is not compiled, or not for the stable ABI: make build")
    with tarfile.open(archive, "w:xz", preset=vllm_part.PRESET) as packed, tempfile.TemporaryDirectory() as scratch:
        for name in tracked():
            _put(packed, name, ROOT / name)
        stripped = Path(scratch, "stripped")
        for name in compiled():
            subprocess.run(["strip", "--strip-debug", "-o", str(stripped), str(ROOT / name)], check=True)
            _put(packed, name, stripped)


def _put(packed: tarfile.TarFile, name: Path, file: Path) -> None:
    member, data = tarfile.TarInfo(str(name)), file.read_bytes()
    member.size, member.mode = len(data), file.stat().st_mode & 0o755
    packed.addfile(member, io.BytesIO(data))


def commit() -> str:
    """What is packed; with a + where something is not committed."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def pack(kit: Path, *, nixl: bool = True) -> dict[str, Any]:
    """Makes the folder anew; returns its manifest. Raises KitError, above all where it is too large to travel."""
    kit = kit.resolve()
    shutil.rmtree(kit, ignore_errors=True)
    for part in ("wheels", "peers", "work"):
        (kit / part).mkdir(parents=True)
    vllm_part.write(kit / VLLM)
    download(kit / "wheels", "-r", str(ROOT / "requirements/gpu-vllm.txt"))
    download(kit / "peers", "-r", str(ROOT / "requirements/gpu-vllm-peers.txt"))
    if nixl:
        (wheel,) = download(kit / "work", NIXL)
        slim(wheel, kit / "wheels")
    shutil.rmtree(kit / "work")
    write_project(kit / PROJECT)
    tiny_model(kit / "tiny")
    return _manifest(kit)


def tiny_model(folder: Path) -> Path:
    """Writes the model that is carried; returns `folder`."""
    return models.generate(folder, "llama", TINY)


def _manifest(kit: Path) -> dict[str, Any]:
    sizes = {part.name: _bytes(part) for part in sorted(kit.iterdir())}
    nixl = list((kit / "wheels").glob("nixl_cu*.whl"))
    sizes["of wheels, NIXL"] = sum(map(_bytes, nixl))
    checkout = sum((ROOT / name).stat().st_size for name in tracked())
    total = sum(map(_bytes, kit.iterdir())) + checkout
    manifest = {
        "commit": commit(),
        "vllm": vllm_part.version(),
        "nixl": bool(nixl),
        "bytes": {**sizes, "checkout": checkout, "total": total},
    }
    (kit / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    if total > LIMIT_BYTES:
        raise KitError(f"{total} bytes travel, the checkout included; {LIMIT_BYTES} may: {manifest['bytes']}")
    return manifest


def _bytes(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )
