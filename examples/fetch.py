"""Fetches what is published, once it is: python examples/fetch.py NAME VERSION, with MODEL_EXPRESS_URL set."""

import sys

from mxcore import fetch

name, version = sys.argv[1:]
weights = fetch(name, version, wait_seconds=60)
for key, tensor in weights.items():
    print(key, tuple(tensor.shape), float(tensor.mean()))
print(weights)
