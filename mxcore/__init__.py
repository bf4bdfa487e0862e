"""The part that runs in a worker: reading checkpoints, host memory, digests, transfers between workers.

Importing this package loads nothing else: no torch, no numpy, no gRPC, no CUDA, no compiled module.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings

TYPE_CHECKING = False  # as typing's, without importing typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["__version__"]

__version__ = "0.1.0"  # equal to pyproject.toml's, held by a test: reading the metadata would cost 10 ms here


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


sys.meta_path.append(_NotBuiltFinder)

_COMMAND = getattr(sys, "argv", [""])[0].rpartition("/")[2] == "mx"  # it looks at servers from machines without torch
if not _COMMAND and "torch" not in sys.modules and importlib.util.find_spec("torch") is None:
    warnings.warn(
        "mxcore: torch is not installed; loading tensors into a model needs it: pip install torch",
        RuntimeWarning,
        stacklevel=2,
    )
