"""The models to be moved, as runs of (how many tensors, bytes of each)."""

from __future__ import annotations

from mxbench.fleet import Shape

GAP_BYTES = 64  # between tensors that are allocations of malloc: none adjoins the next

MANY: Shape = [(20_000, 50 << 10)]
FEW: Shape = [(8, 128 << 20)]

_HIDDEN, _FEED_FORWARD, _KEY_VALUE, _VOCABULARY, _LAYERS = 896, 4864, 128, 151_936, 24
MIX: Shape = [  # Qwen2.5-0.5B in bfloat16: embedding, layers, last norm
    (1, 2 * _VOCABULARY * _HIDDEN),
    *(
        [
            (2, 2 * _HIDDEN * _HIDDEN),
            (2, 2 * _KEY_VALUE * _HIDDEN),
            (1, 2 * _HIDDEN),
            (2, 2 * _KEY_VALUE),
            (3, 2 * _FEED_FORWARD * _HIDDEN),
            (2, 2 * _HIDDEN),
        ]
        * _LAYERS
    ),
    (1, 2 * _HIDDEN),
]
SHAPES: dict[str, tuple[Shape, int]] = {  # with the gap between two tensors
    "many": (MANY, 0),
    "many_apart": (MANY, GAP_BYTES),
    "few": (FEW, 0),
    "mix": (MIX, 0),
}


def scaled(shape: Shape, factor: float) -> Shape:
    """The same tensors, smaller."""
    return [(count, max(1, int(size * factor))) for count, size in shape]
