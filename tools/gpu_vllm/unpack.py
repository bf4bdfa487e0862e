"""On the GPU machine: unpacks the kit, installs its wheels into folders of their own, and starts the steps from there.

Nothing but Python's own library is imported here, and nothing of the machine is changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

INSTALL = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile")
PROOF = "import mxcore.digest, mxcore.cuda.driver, mxcore.nixl.agent, mxcore.reading.checkpoint_reader"


def unpack(kit: Path, work: Path) -> dict[str, Path]:
    """The folders by name: `site` and `peers` for PYTHONPATH, and `project`, from which the steps run."""
    folders = {name: work / name for name in ("site", "peers", "project")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    _untar(kit / "vllm.tar.xz", folders["site"])
    for part, name in (("wheels", "site"), ("peers", "peers")):
        _python(*INSTALL, "--no-cache-dir", "--target", str(folders[name]), *map(str, (kit / part).glob("*.whl")))
    _untar(kit / "project.tar.xz", folders["project"])
    _prove_core(folders["site"], folders["project"])
    return folders


def _prove_core(site: Path, project: Path) -> None:
    """The compiled core loads as it came, or it is compiled here. Raises RuntimeError."""
    if _loads(site, project):
        return
    _python("setup.py", "-q", "build_ext", "--inplace", "--force", cwd=project)
    if not _loads(site, project):
        raise RuntimeError("the compiled core neither loads as it came nor as it was compiled here")


def _loads(site: Path, folder: Path) -> bool:
    ran = subprocess.run([sys.executable, "-c", PROOF], cwd=folder, env=environment(site, folder), capture_output=True)
    return ran.returncode == 0


def environment(site: Path, project: Path) -> dict[str, str]:
    """With the kit's packages before the machine's, and the project's benches, which nobody installs there."""
    path = os.pathsep.join(filter(None, [str(site), str(project / "bench"), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run(kit: Path, folders: dict[str, Path], work: Path, out: Path, settings: dict[str, Any]) -> int:
    """Runs the steps, with what was unpacked; returns their exit code."""
    about = json.loads((kit / "kit.json").read_text())
    everything = {
        "gpu": True,
        "folder": str(work),
        "out": str(out.resolve()),
        "tiny": str((kit / "tiny").resolve()),
        "peers": str(folders["peers"]),
        "about": {name: about[name] for name in ("commit", "vllm", "nixl")},
        **settings,
    }
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tools.gpu_vllm.runner", json.dumps(everything)]
    return subprocess.run(
        command, cwd=folders["project"], env=environment(folders["site"], folders["project"])
    ).returncode


def _untar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")


def _python(*words: str, cwd: Path | None = None) -> None:
    subprocess.run([sys.executable, *words], check=True, cwd=cwd)
