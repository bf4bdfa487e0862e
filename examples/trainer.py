"""Publishes a version each step: python examples/trainer.py NAME. A line of input is a step; its end is the end."""

import sys
from contextlib import ExitStack

import numpy as np

from mxcore import publish

name = sys.argv[1]
weights = {"weight": np.zeros((1024, 1024), np.float32)}
with ExitStack() as older:
    for step, _line in enumerate(sys.stdin):
        weights["weight"] += 1  # an optimizer's step
        newer = publish(name, weights, step, copy=True)  # readers have a copy: training goes on
        older.close()  # waits for those that still read the version before
        older.enter_context(newer)
        print(newer, flush=True)
