"""A worker's memory that goes bad while it serves."""

from __future__ import annotations

import gc

from vllm.distributed import get_tp_group

from mxcore.engine import Weights
from tests.self_checks import end_self_checks


class CorruptingExtension:
    """Methods for `worker_extension_cls`."""

    def corrupt_rank_1(self) -> int:
        """Flips a bit in each o_proj that rank 1 serves, so that its readers refuse it; how many were flipped."""
        import torch

        if get_tp_group().rank_in_group != 1:
            return 0
        end_self_checks()
        flipped = 0
        for weights in [held for held in gc.get_objects() if isinstance(held, Weights)]:
            for name, tensor in weights.found.kept.items():
                if "o_proj" in name and tensor.numel():
                    tensor.view(-1)[:1].view(torch.uint8)[:1].bitwise_xor_(1)
                    flipped += 1
        return flipped
