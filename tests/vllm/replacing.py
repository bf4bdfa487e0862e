"""Another checkpoint comes under a model's path when its files have just been read; run in a process with vLLM."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mxbench.demo.models import weight_files


def replace(model: Path, other: Path) -> None:
    """The weight files of `other`, of the same names, in the place of those of `model`."""
    for file in weight_files(other):
        shutil.copy(file, model / file.name)


def when_read(model: str, other: str) -> None:
    """`replace` after the next load's reading, before the loader looks at the files again."""
    from vllm_plugin.storage_loader import StorageLoader

    load_weights = StorageLoader.load_weights

    def replacing(self: Any, *args: Any) -> None:
        StorageLoader.load_weights = load_weights  # type: ignore[method-assign]
        load_weights(self, *args)
        replace(Path(model), Path(other))

    StorageLoader.load_weights = replacing  # type: ignore[method-assign]
