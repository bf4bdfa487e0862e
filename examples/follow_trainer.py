"""Takes each version that a trainer publishes, into the same memory: python examples/follow_trainer.py NAME LAST."""

import sys

import numpy as np

from mxcore import fetch

name, last = sys.argv[1], int(sys.argv[2])
weights = {"weight": np.zeros((1024, 1024), np.float32)}
version = -1
while version < last:
    version = int(fetch(name, newer_than=version, wait_seconds=60, into=weights).version)
    print(version, weights["weight"].min(), weights["weight"].max(), flush=True)
