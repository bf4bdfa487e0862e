"""An update that fails half-way: run in an engine's process, or as a method of one of its ranks."""

from __future__ import annotations

from typing import Any

from mxcore.engine import Staged

_commit = Staged.commit


def cut(after: int) -> None:
    """The next update fails when it writes its `after`-th module; the one after that does not."""
    left = [after]

    def commit(self: Staged, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("cut by the test")
        return _commit(self, *args, **kwargs)

    Staged.commit = commit  # type: ignore[method-assign]


class CuttingExtension:
    """Methods for `worker_extension_cls`."""

    def cut_rank_1(self, after: int) -> None:
        """As `cut`, in the process of rank 1 alone."""
        from vllm.distributed import get_tp_group

        if get_tp_group().rank_in_group == 1:
            cut(after)
