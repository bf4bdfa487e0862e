"""Where NIXL's C library may lie; found without importing NIXL's Python packages, which may import torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["NIXL_PACKAGES", "library_candidates"]

NIXL_PACKAGES = ("nixl_cu12", "nixl_cu13")
_LIBRARY = "libnixl_capi.so"


def library_candidates() -> list[str]:
    """Paths to try, in order: beside the installed wheels, then by the loader's own search path.

    The wheels put their libraries into `.<package>.mesonpy.libs` next to the package. The last candidate is a bare
    file name, which finds a NIXL that an image built itself (LD_LIBRARY_PATH, ld.so.conf).
    """
    candidates = []
    for package in NIXL_PACKAGES:
        spec = importlib.util.find_spec(package)  # a top-level package is found without being imported
        for location in (spec.submodule_search_locations or ()) if spec is not None else ():
            candidates.append(str(Path(location).parent / f".{package}.mesonpy.libs" / _LIBRARY))
    return [*candidates, _LIBRARY]
