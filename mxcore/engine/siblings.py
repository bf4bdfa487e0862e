"""Messages between the processes of one engine that are in one group of torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import distributed

from mxcore.agreement import MESSAGE_BYTES, Gather

__all__ = ["gather_over_gloo"]

_JOINED_WITHIN = timedelta(seconds=120)  # processes begin to load seconds apart


def gather_over_gloo(ranks: Sequence[int]) -> Gather:
    """A group of its own over `ranks` of the default group, whose every process calls this at the same time.

    An existing group would not do: a thread uses this one beside the engine's collectives. Raises RuntimeError when
    they do not all come.
    """
    group = distributed.new_group(list(ranks), timeout=_JOINED_WITHIN, backend="gloo")

    def gather(message: bytes, timeout_seconds: float) -> list[bytes]:
        sent = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        received = [torch.empty(MESSAGE_BYTES, dtype=torch.uint8) for _ in ranks]
        work = distributed.all_gather(received, sent, group=group, async_op=True)
        if work is None or not work.wait(timedelta(seconds=timeout_seconds)):
            raise RuntimeError(f"no answer within {timeout_seconds:g} s")
        return [bytes(tensor.numpy()) for tensor in received]

    return gather
