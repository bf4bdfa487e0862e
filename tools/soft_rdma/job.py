"""What runs in the guest, in the host's own file tree: a wire with two RDMA devices, then pytest."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from mxcore.nixl import NIXL_PACKAGES
from tools.soft_rdma.errors import SoftRdmaError

__all__ = ["job_script", "library_folders", "verbs_environment"]

_TRIPLET = "x86_64-linux-gnu"
_SCRATCH = "/run/soft-rdma"


def library_folders(root: Path) -> str:
    """An LD_LIBRARY_PATH with the libraries of the extracted packages."""
    return f"{root}/usr/lib/{_TRIPLET}:{root}/lib/{_TRIPLET}"


def verbs_environment(root: Path, folder: Path) -> dict[str, str]:
    """What makes NIXL's wheel find the driver of Soft-RoCE.

    The wheel brings its own libibverbs under another file name, and the driver, Debian's, asks for libibverbs.so.1: a
    link of this name in `folder` makes both the same library. Raises SoftRdmaError without a driver.
    """
    places = [path / "usr/lib" / _TRIPLET / "libibverbs" for path in (root, Path("/"))]
    drivers = [driver for place in places for driver in sorted(place.glob("librxe-rdmav*.so"))]
    if not drivers:
        raise SoftRdmaError(f"no driver librxe in {' or '.join(map(str, places))}: it is in ibverbs-providers")
    environment = {"IBV_DRIVERS": str(drivers[0]).rpartition("-rdmav")[0]}
    bundled = [path for package in NIXL_PACKAGES for path in _wheel_libraries(package)]
    if bundled:
        link = folder / "verbs" / "libibverbs.so.1"
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(bundled[0])
        environment["LD_LIBRARY_PATH"] = str(link.parent)
    return environment


def _wheel_libraries(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations or () if spec is not None else ()
    return [path for place in places for path in sorted((Path(place).parent / f"{package}.libs").glob("libibverbs-*"))]


def job_script(
    checkout: Path,
    python: Path,
    root: Path,
    network: str,
    environment: Mapping[str, str],
    pytest_arguments: Sequence[str],
) -> str:
    """The guest's shell script; its exit status is pytest's."""
    folders = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
    path = ":".join([*folders, *(f"{root}{folder}" for folder in folders[2:])])
    names = {
        "TEST_RDMA": "rxea:1,rxeb:1",
        "TMPDIR": _SCRATCH,
        "HOME": _SCRATCH,
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    pytest = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *pytest_arguments]
    return "\n".join(
        [
            f"export PATH={shlex.quote(path)}",
            f"mkdir -p {_SCRATCH} && mount -t tmpfs memory {_SCRATCH}",
            f"(\nset -e\nexport LD_LIBRARY_PATH={shlex.quote(library_folders(root))}\n{network}) || exit 90",
            *(f"export {name}={shlex.quote(value)}" for name, value in names.items()),
            f"cd {shlex.quote(str(checkout))} || exit 91",
            shlex.join(pytest),
            "",
        ]
    )
