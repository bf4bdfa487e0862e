"""Publishes tensors of which a byte then flips, as in broken memory: python examples/flipped_byte.py NAME VERSION.

Whoever fetches them is refused, and gets no tensors. The publisher looks at its own memory as well: when it has seen
the byte it serves no more.
"""

import sys

import numpy as np

from mxcore import publish

name, version = sys.argv[1:]
weights = {"weight": np.zeros((1024, 1024), np.float32)}
with publish(name, weights, version) as published:
    weights["weight"].view(np.uint8)[512, 99] ^= 1  # after its digest was made
    print(published, flush=True)
    sys.stdin.read()
