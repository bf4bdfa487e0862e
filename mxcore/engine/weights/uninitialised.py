"""Memory that a model's constructor left uninitialised: marked while it is allocated, and told apart later.

`torch.empty` and its kind are what parameters come from. Their memory holds anything, often what was there before: the
weights of the model that was built a moment ago. Filled with a pattern, what nothing has written to since is known, and
what nobody writes is the same at every worker. The pattern is almost nothing in each type: at most 2.4e-38 in float32
and bfloat16, 1.5e-5 in float16, 0.002 in float8 (e4m3).
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["MarkUninitialised", "Unwritten", "still_marked", "unwritten"]

_log = logging.getLogger(__name__)

PATTERN = bytes.fromhex("0100000100010100")
_WORD = int.from_bytes(PATTERN, "little", signed=True)
_COMPARED_AT_ONCE_BYTES = 64 * 2**20
_SMALL_WORDS = 8192  # of a tensor with more, one word in so many is looked at:
_STEP = 61  # a prime: a matrix has seldom rows of a multiple of it, of which some columns would never be met
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


class Unwritten(NamedTuple):
    """Of the pieces of a tensor that were looked at, those that nothing has written to since they were allocated."""

    pieces: int
    looked_at: int

    def is_more_than(self, before: Unwritten | None) -> bool:
        """Whether a part of the tensor has no value that had one; below a thousandth it may be chance."""
        return self.pieces - (before.pieces if before else 0) > self.looked_at // 1024


def unwritten(tensors: Mapping[str, torch.Tensor]) -> dict[str, Unwritten]:
    """Of tensors that nothing has written to, or only in part, how much of them that is.

    A piece is an element, or eight bytes. Of large tensors a sample is looked at, the same one each time.
    """
    counts: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    looked: dict[torch.device, list[tuple[str, int]]] = defaultdict(list)
    for name, tensor in tensors.items():
        marked = _marked_pieces(tensor)
        counts[tensor.device].append(marked.sum())
        looked[tensor.device].append((name, marked.numel()))
    return {
        name: Unwritten(count, looked_at)
        for device, named in looked.items()
        for (name, looked_at), count in zip(named, torch.stack(counts[device]).tolist(), strict=True)
        if count
    }


def _marked_pieces(tensor: torch.Tensor) -> torch.Tensor:
    """Whether each piece that is looked at holds the pattern. Elements of a byte are too easily what it has."""
    span, size = _span(tensor), tensor.element_size()
    if not span.numel():
        return span.bool()
    if size > 1 and span.numel() <= _SMALL_WORDS * len(PATTERN):
        expected = torch.frombuffer(bytearray(_expected(tensor, span.numel())), dtype=torch.uint8)[: span.numel()]
        return (span.view(-1, size) == expected.to(span.device).view(-1, size)).all(1)
    start = -tensor.storage_offset() * size % len(PATTERN)  # where the pattern begins
    length = max(0, span.numel() - start) // len(PATTERN) * len(PATTERN)
    if not length:
        return torch.tensor([_is_marked(span, tensor)], device=span.device)
    words = span[start : start + length].view(torch.int64)
    return words[:: _STEP if words.numel() > _SMALL_WORDS else 1] == _WORD


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
