"""A NIXL wheel with what workers use of it alone: python tools/slim_nixl.py WHEEL FOLDER

NIXL's libraries, its UCX plugin and UCX stay; its Python bindings, the plugins for storage and the expert-parallel
kernels, which are most of its size, go. For places with a limit on what can be carried there
(docs/notes/gpu-testing.md); the result installs like the wheel that it was made of.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path, PurePosixPath

GONE_FOLDERS = ("nixl_ep_", ".nixl_ep_")
KEPT_PLUGIN = "libplugin_UCX.so"


def is_kept(name: str) -> bool:
    """Whether a file of the wheel stays."""
    path = PurePosixPath(name)
    if path.parts[0].startswith(GONE_FOLDERS):
        return False
    if path.name.startswith("libplugin_"):
        return path.name == KEPT_PLUGIN
    return not (path.parts[0].startswith("nixl_cu") and path.name.startswith("_bindings"))


def slim(wheel: Path, folder: Path) -> Path:
    """Writes the smaller wheel, of the same name, into a folder; returns it. Raises ValueError for another package."""
    if not wheel.name.startswith("nixl_cu"):
        raise ValueError(f"{wheel.name} is no wheel of nixl-cu12 or nixl-cu13")
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as to:
        for info in source.infolist():
            if not is_kept(info.filename):
                continue
            data = source.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                rows = data.decode().splitlines(keepends=True)
                data = "".join(row for row in rows if is_kept(row.split(",")[0].strip('"'))).encode()
            to.writestr(info, data)
    return made


def main() -> None:
    """One wheel."""
    made = slim(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{made}: {made.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
