"""Tensors in host memory for tests: described by hand, so that no engine is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mxcore.transfer.layout import LocalTensor
from mxcore.transfer.member import PROTOCOL_VERSION
from mxserver.wire.proto import p2p_pb2


@dataclass(frozen=True)
class Spec:
    """A tensor in the storage `storage`, `offset` elements in; `stride` None is contiguous."""

    name: str
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    storage: str
    offset: int = 0
    stride: tuple[int, ...] | None = None

    def placing_stride(self) -> tuple[int, ...]:
        if self.stride is not None:
            return self.stride
        steps = []
        step = 1
        for length in reversed(self.shape):
            steps.append(step)
            step *= max(length, 1)
        return tuple(reversed(steps))

    def end_bytes(self) -> int:
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.shape, self.placing_stride(), strict=True))
        return (self.offset + last + 1) * self.itemsize


class HostTensors:
    """Storages filled with bytes of `seed`, or zero without one, and the tensors in them."""

    def __init__(self, specs: Sequence[Spec], seed: int | None) -> None:
        self.specs = specs
        sizes: dict[str, int] = {}
        for spec in specs:
            sizes[spec.storage] = max(sizes.get(spec.storage, 0), spec.end_bytes())
        generator = np.random.default_rng(seed)
        self.storages = {
            name: np.zeros(size, np.uint8) if seed is None else generator.integers(0, 256, size, np.uint8)
            for name, size in sizes.items()
        }

    def local_tensors(self) -> list[LocalTensor]:
        return [
            LocalTensor(
                name=spec.name,
                dtype=spec.dtype,
                shape=spec.shape,
                stride=spec.placing_stride(),
                address=self.address(spec.storage) + spec.offset * spec.itemsize,
                itemsize_bytes=spec.itemsize,
                storage_address=self.address(spec.storage),
                storage_bytes=self.storages[spec.storage].nbytes,
                device_type="cpu",
                device_index=0,
            )
            for spec in self.specs
        ]

    def address(self, storage: str) -> int:
        return int(self.storages[storage].ctypes.data)

    def copy_from(self, other: HostTensors, stretches: Iterable[tuple[int, int]]) -> int:
        """Fills memory of this one, from its first address to after its last, with the other's; returns the bytes."""
        filled = 0
        for begin, end in stretches:
            for name, storage in self.storages.items():
                first = self.address(name)
                low, high = max(begin, first) - first, min(end, first + storage.nbytes) - first
                if low < high:
                    storage[low:high] = other.storages[name][low:high]
                    filled += high - low
        return filled

    def equal_bytes(self, other: HostTensors) -> bool:
        """Whether every byte that a tensor covers, or that lies between its elements, is the same."""
        for spec in self.specs:
            begin, end = spec.offset * spec.itemsize, spec.end_bytes()
            if not np.array_equal(self.storages[spec.storage][begin:end], other.storages[spec.storage][begin:end]):
                return False
        return True


def model_specs(megabytes: int = 4, prefix: str = "") -> list[Spec]:
    """A small model of about `megabytes` MB: tied, strided, shared, empty, scalar tensors and odd sizes."""
    block = megabytes * 100_000
    layers = [Spec(f"{prefix}layers.{i}.weight", "torch.bfloat16", 2, (block // 2, 1), f"layer{i}") for i in range(8)]
    return [
        *layers,
        Spec(f"{prefix}embed.weight", "torch.float32", 4, (block // 4, 2), "embed"),
        Spec(f"{prefix}head.weight", "torch.float32", 4, (block // 4, 2), "embed"),  # tied
        Spec(f"{prefix}fused.q", "torch.float16", 2, (101, 30), "fused", 0, (90, 1)),  # views with gaps, interleaved
        Spec(f"{prefix}fused.k", "torch.float16", 2, (101, 30), "fused", 30, (90, 1)),
        Spec(f"{prefix}transposed", "torch.float8_e4m3fn", 1, (33, 65), "transposed", 7, (1, 33)),
        Spec(f"{prefix}scale", "torch.float64", 8, (), "scale"),
        Spec(f"{prefix}flag", "torch.bool", 1, (3,), "flag"),
        Spec(f"{prefix}nothing", "torch.int32", 4, (0, 5), "nothing"),
        Spec(f"{prefix}one", "torch.int8", 1, (1, 1, 1), "one"),
    ]


def identity(checkpoint: str = "c0ffee", model: str = "test/model") -> p2p_pb2.SourceIdentity:
    return p2p_pb2.SourceIdentity(
        mx_version=PROTOCOL_VERSION,
        model_name=model,
        backend_framework=p2p_pb2.BACKEND_FRAMEWORK_VLLM,
        tensor_parallel_size=1,
        dtype="bfloat16",
        extra_parameters={"layout": "raw", "checkpoint": checkpoint},
    )
