"""Memory that a model's constructor left uninitialised: marked while it is allocated, and told apart later.

`torch.empty` and its kind are what parameters come from. Their memory holds anything, often what was there before: the
weights of the model that was built a moment ago. Filled with a pattern, what nothing has written to since is known, and
what nobody writes is the same at every worker. The pattern is almost nothing in each type: at most 2.4e-38 in float32
and bfloat16, 1.5e-5 in float16, 0.002 in float8 (e4m3).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["MarkUninitialised", "still_marked"]

_log = logging.getLogger(__name__)

PATTERN = bytes.fromhex("0100000100010100")
_WORD = int.from_bytes(PATTERN, "little", signed=True)
_COMPARED_AT_ONCE_BYTES = 64 * 2**20
_aten = torch.ops.aten
_EMPTY = frozenset(
    overload
    for packet in (
        _aten.empty,
        _aten.empty_like,
        _aten.empty_strided,
        _aten.empty_permuted,
        _aten.new_empty,
        _aten.new_empty_strided,
    )
    for overload in (getattr(packet, name) for name in packet.overloads() if name != "out")
)


class MarkUninitialised(TorchDispatchMode):  # type: ignore[misc]  # torch does not type it
    """A context: what is allocated in it, on this thread, without a value is filled with the pattern.

    Around a model's constructor only: each torch call takes microseconds longer.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's own hook: without it torch wraps the method so that its first call imports the compiler (9 s)."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Collection[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        grows = func is _aten.resize_.default and not args[0].untyped_storage().nbytes()  # torch.Tensor(2, 3)
        made = func(*args, **(kwargs or {}))
        if (func in _EMPTY or grows) and isinstance(made, torch.Tensor):
            try:
                _fill(made)
            except (RuntimeError, NotImplementedError) as error:  # then it counts as valued
                _log.debug("memory of a %s tensor on %s is not marked: %s", made.dtype, made.device, error)
        return made


def still_marked(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of those that hold nothing but the pattern, where their memory has it."""
    spans = {name: span for name, tensor in tensors.items() if (span := _span(tensor)).numel()}
    suspects = _begin_marked(spans)
    return {name for name in suspects if _is_marked(spans[name], tensors[name])}


def _fill(tensor: torch.Tensor) -> None:
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        return
    storage = tensor.untyped_storage()
    words, rest = divmod(storage.nbytes(), len(PATTERN))
    if words:
        torch.empty(0, dtype=torch.int64, device=tensor.device).set_(storage, 0, (words,)).fill_(_WORD)
    if rest:
        tail = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, words * len(PATTERN), (rest,))
        tail.copy_(torch.tensor(list(PATTERN[:rest]), dtype=torch.uint8))


def _span(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes from a tensor's first element to its last."""
    size = tensor.element_size()
    length = 0
    if tensor.numel():
        length = size * (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)))
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return whole.set_(tensor.untyped_storage(), tensor.storage_offset() * size, (length,))


def _expected(tensor: torch.Tensor, length: int) -> bytes:
    """What the pattern looks like from a tensor's first element on."""
    shift = tensor.storage_offset() * tensor.element_size() % len(PATTERN)
    return (PATTERN[shift:] + PATTERN[:shift]) * (-(-length // len(PATTERN)))


def _begin_marked(spans: Mapping[str, torch.Tensor]) -> list[str]:
    """Whose first bytes are some of the pattern's; one copy from a device for all of them."""
    if not spans:
        return []
    ends = [0, *itertools.accumulate(min(len(PATTERN), span.numel()) for span in spans.values())]
    firsts = torch.cat([span[: len(PATTERN)] for span in spans.values()]).cpu().numpy().tobytes()
    rotated = PATTERN + PATTERN
    return [
        name for name, (begin, end) in zip(spans, itertools.pairwise(ends), strict=True) if firsts[begin:end] in rotated
    ]


def _is_marked(span: torch.Tensor, tensor: torch.Tensor) -> bool:
    pattern = _expected(tensor, min(span.numel(), _COMPARED_AT_ONCE_BYTES))[
        : min(span.numel(), _COMPARED_AT_ONCE_BYTES)
    ]
    expected = torch.frombuffer(bytearray(pattern), dtype=torch.uint8).to(span.device)
    return all(torch.equal(part, expected[: part.numel()]) for part in span.split(_COMPARED_AT_ONCE_BYTES))
