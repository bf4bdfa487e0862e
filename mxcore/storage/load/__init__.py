"""Tensors of a checkpoint into host or device memory, whole or as a stream."""

from __future__ import annotations

from mxcore.storage.load import device_load
from mxcore.storage.load.cufile_trial import trial
from mxcore.storage.load.device_direct import chosen, probe, why_not
from mxcore.storage.load.device_load import read_open_files, read_rows_to_device
from mxcore.storage.load.device_ring import release_rings
from mxcore.storage.load.host_load import STRAIGHT, LoadReport, Reader, load
from mxcore.storage.load.read_record import ReadRecord
from mxcore.storage.load.tensor_stream import BATCH_BYTES, load_file, stream

__all__ = [
    "BATCH_BYTES",
    "STRAIGHT",
    "LoadReport",
    "ReadRecord",
    "Reader",
    "chosen",
    "device_load",
    "load",
    "load_file",
    "probe",
    "read_open_files",
    "read_rows_to_device",
    "release_rings",
    "stream",
    "trial",
    "why_not",
]
