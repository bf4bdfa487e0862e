"""Publishes tensors until its input ends: python examples/publish.py NAME VERSION, with MODEL_EXPRESS_URL set."""

import sys

import numpy as np

from mxcore import publish

name, version = sys.argv[1:]
weights = {f"layers.{number}": np.full((512, 1024), number, np.float32) for number in range(8)}
with publish(name, weights, version) as published:
    print(published, flush=True)
    sys.stdin.read()
