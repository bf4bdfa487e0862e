"""A root file system of Debian, and one of it that stands for a vLLM image: vLLM's CPU build of this environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.test_kubernetes import ROOT
from tests.deploy.test_server_container import _may_unshare
from tools.image_chroot import Builder, ImageError, debian

DEBIAN = "debian:bookworm-slim"
VLLM = "vllm-of-this-environment"
PACKAGES = "/opt/packages"  # where the chroots see this environment's packages
OURS = (
    "grpc_health",
    "grpcio_health_checking",
    "xxhash",
    "mx_modelexpress",
    "__editable__",
    "_virtualenv",
    "distutils",
)


@pytest.fixture(scope="session", autouse=True)
def _needs_root() -> None:
    if not _may_unshare() or not shutil.which("chroot"):
        pytest.skip("chroots need root, and namespaces of mounts")
    if not shutil.which("debootstrap"):
        pytest.skip("no debootstrap: tools/install_test_packages.sh installs it")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the file systems are: some gigabytes, gone afterwards."""
    folder = tmp_path_factory.mktemp("images")
    folder.chmod(0o755)  # programs run as other users below it
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def base(place: Path) -> Path:
    """TEST_DEBIAN names one that is there already; else the first run packs one for those that follow."""
    if given := os.environ.get("TEST_DEBIAN"):
        return Path(given)
    try:
        return debian(place / "debian", kept=ROOT / "build" / "images" / "bookworm.tar")
    except ImageError as error:
        pytest.skip(f"debootstrap had no Debian: {error}")


STAND_IN = f"""\
FROM {DEBIAN}
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libnuma1 python3-dev python3-venv \\
    && python3 -m venv /opt/venv
"""


@pytest.fixture(scope="session")
def packages() -> dict[Path, str]:
    """What RUN, and what runs, sees of this environment."""
    return {Path(sysconfig.get_path("purelib")): PACKAGES}


@pytest.fixture(scope="session")
def vllm_image(place: Path, base: Path, packages: dict[Path, str]) -> Path:
    """Python with vLLM, and without what this package needs beside it: as links to this environment's packages."""
    dockerfile = place / "Dockerfile"
    dockerfile.write_text(STAND_IN)
    made = place / "vllm"
    made.mkdir()
    image = Builder(dockerfile, place, made, {}).build({DEBIAN: base})
    [there] = packages
    [target] = image.root.glob("opt/venv/lib/python3*/site-packages")
    present = {path.name for path in target.iterdir()}
    for path in there.iterdir():
        if path.name not in present and not path.name.startswith(OURS) and path.suffix != ".pth":
            (target / path.name).symlink_to(f"{PACKAGES}/{path.name}")
    (image.root / PACKAGES.lstrip("/")).mkdir()
    subprocess.run(["cp", "-a", "/etc/passwd", str(image.root / "etc/passwd")], check=True)
    return image.root
