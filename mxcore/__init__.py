"""Model weights: read from where they lie, and moved from process to process, each byte verified.

docs/reference/api.md is for who uses it.

Importing this package loads nothing: no torch, no numpy, no gRPC, no CUDA, no compiled module. Each name of `__all__`
is looked up when it is first used; their types are in `__init__.pyi`.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as typing's, without importing typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__version__ = "0.1.0"  # equal to pyproject.toml's, held by a test: reading the metadata would cost 10 ms here

_EXPORTS = {
    "Checkpoint": "mxcore.storage.checkpoint",
    "Fetched": "mxcore.exchange",
    "LoadReport": "mxcore.storage.load",
    "MxError": "mxserver.wire",
    "Published": "mxcore.exchange",
    "RemoteCheckpoint": "mxcore.storage.access",
    "TensorInfo": "mxcore.storage.checkpoint",
    "Want": "mxcore.storage.plan",
    "fetch": "mxcore.exchange",
    "load": "mxcore.storage.access",
    "load_file": "mxcore.storage.access",
    "open_checkpoint": "mxcore.storage.access",
    "publish": "mxcore.exchange",
    "stream": "mxcore.storage.access",
}
__all__ = [
    "Checkpoint",
    "Fetched",
    "LoadReport",
    "MxError",
    "Published",
    "RemoteCheckpoint",
    "TensorInfo",
    "Want",
    "__version__",
    "fetch",
    "load",
    "load_file",
    "open_checkpoint",
    "publish",
    "stream",
]


def __getattr__(name: str) -> object:
    if (module := _EXPORTS.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    globals()[name] = value = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


class _NotBuiltFinder:
    """The last finder asked: a module that has a stub beside it but no binary was not built, and says how to."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        from pathlib import Path  # here, as below: importing mxcore costs nothing

        stub = f"{name.rpartition('.')[2]}.pyi"
        if not any((Path(folder) / stub).is_file() for folder in path or ()):
            return None
        from mxcore.errors import NotBuilt

        python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        raise NotBuilt(f"{name} is not built for {python}: run `make build`, or `pip install -e .`", name=name)


def _is_source_tree() -> bool:
    """Whether a module may be missing because it was not built: wheels have no sources of compiled modules."""
    import os

    return os.path.exists(os.path.join(__path__[0], "digest", "digest.pyx"))  # noqa: PTH110, PTH118 - pathlib costs


if _is_source_tree():
    sys.meta_path.append(_NotBuiltFinder)
