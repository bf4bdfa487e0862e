"""The rest of a model from storage, where a transfer ended early: only the bytes whose chunks did not come are read.

The engine's own loader runs over the model once more, with tensors that are read where they are copied into memory
that is still missing (`lazy_tensors`). What it copies into verified chunks is not read; what it does without a plain
copy is read and done as ever. Afterwards every chunk must be what the workers' digests promise.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import nn

from mxcore.engine.context import LoadContext
from mxcore.engine.loaded import verified_of
from mxcore.engine.protocol import Files
from mxcore.errors import ReceivedInPart, TransferStalled

__all__ = ["MissingBytes", "fill_missing"]

_log = logging.getLogger(__name__)


def fill_missing(partial: ReceivedInPart, model: nn.Module, context: LoadContext) -> int:
    """Reads what is missing of `model`, whose memory `partial` is about; how many bytes. Then comes `partial.complete`.

    Where files have to be verified they are read whole: then all of the model comes from them.

    Raises what the engine's loader raises: then the model is to be built anew. TransferStalled once another process of
    the engine has failed.
    """

    def told(_done_bytes: int, _total_bytes: int) -> None:
        if context.agreement.is_given_up():
            raise TransferStalled("another process of this engine has failed: the rest is not read")

    _log.warning(
        "%d of %d bytes did not come from workers: they are read from storage",
        partial.missing_bytes,
        partial.total_bytes,
    )
    verified = verified_of(context, None)
    source = Files(needed=MissingBytes(partial.missing_stretches()).rows, verified=verified)
    count = context.engine.fill(model, source, context.settings, told)
    if verified is not None:
        verified.finish()
    return count


class MissingBytes:
    """Stretches of this process' memory, as (first address, address after the last), ascending and apart."""

    def __init__(self, stretches: Sequence[tuple[int, int]]) -> None:
        self._begins = [begin for begin, _ in stretches]
        self._stretches = stretches

    def rows(self, to: torch.Tensor) -> list[tuple[int, int]]:
        """Ranges of the first dimension of a tensor in host memory that touch what is missing, ascending and apart.

        A tensor without dimensions is one row. A row that is missing in part is in a range as a whole.
        """
        count = to.shape[0] if to.dim() else 1
        if not to.numel():
            return []
        inner = sum((size - 1) * step for size, step in zip(to.shape[1:], to.stride()[1:], strict=True))
        span = (inner + 1) * to.element_size()  # of a row, from its first byte to its last
        pitch = to.stride(0) * to.element_size() if count > 1 else span
        first_byte = to.data_ptr()
        end_byte = first_byte + (count - 1) * pitch + span
        found: list[tuple[int, int]] = []
        for begin, end in self._stretches[max(0, bisect_right(self._begins, first_byte) - 1) :]:
            if begin >= end_byte:
                break
            if end <= first_byte:
                continue
            first = max(0, (begin - first_byte - span) // pitch + 1)
            last = min(count, -(-(end - first_byte) // pitch))
            if found and found[-1][1] >= first:
                found[-1] = (found[-1][0], max(found[-1][1], last))
            elif first < last:
                found.append((first, last))
        return found
