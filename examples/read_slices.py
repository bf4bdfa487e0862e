"""Reads one rank's rows of each matrix: python examples/read_slices.py s3://BUCKET/PREFIX RANK RANKS, or a folder."""

import sys

import numpy as np

from mxcore import Want, load, open_checkpoint

place, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
checkpoint = open_checkpoint(place)  # headers only
wants = []
for name, tensor in checkpoint.items():
    if len(tensor.shape) == 2 and tensor.dtype == "F32":
        rows, columns = tensor.shape
        box = ((rows * rank // ranks, rows * (rank + 1) // ranks), (0, columns))
        wants.append(Want(name, np.empty((box[0][1] - box[0][0], columns), np.float32), box))
report = load(checkpoint, wants, progress=lambda done, total: print(f"{done} of {total} bytes", file=sys.stderr))
for want in wants:
    print(want.name, want.to.shape, float(want.to.sum()))
print(f"{report.read_bytes} of {checkpoint.total_bytes} bytes were read")
