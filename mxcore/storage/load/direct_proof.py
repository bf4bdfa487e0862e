"""cuFile is tried on bytes of the load's own file: a way that changes one, or one beside them, never reads weights.

The bytes go into memory that the load is going to overwrite, at a whole block and beside one, and come back by a copy.
What lay there before differs in every byte, so that a read which does nothing shows.
"""

from __future__ import annotations

import os

from mxcore.cuda import Stream, copy_to_device, copy_to_host
from mxcore.errors import CuFileError
from mxcore.reading import BLOCK_BYTES, LEAST_BYTES, DeviceRing, FileHandles
from mxcore.storage.plan import Row

__all__ = ["ROOM_BYTES", "prove"]

ROOM_BYTES = LEAST_BYTES + 2 * BLOCK_BYTES  # of a run that it can be tried on
_BESIDE_BYTES = 16  # as tensors are aligned in a file
_GUARD = 0xA5
_INVERTED = bytes(255 - value for value in range(256))


def prove(handles: FileHandles, ring: DeviceRing, row: Row) -> None:
    """Tries a registered file on one of its rows, of ROOM_BYTES or more. Raises CuFileError, CudaError."""
    file, offset, address = row[0], row[1], row[5]
    begin = -(-offset // BLOCK_BYTES) * BLOCK_BYTES
    try:
        expected = os.pread(handles.files.descriptor(file), LEAST_BYTES, begin)
    except OSError as error:
        raise CuFileError(f"{handles.files.paths[file]}: it cannot be compared with: {error}") from error
    stream = Stream(ring.context)
    ring.wait()
    for place in (-address % BLOCK_BYTES, (-address + _BESIDE_BYTES) % BLOCK_BYTES):
        rest = ROOM_BYTES - place - len(expected)
        before, after = bytes([_GUARD]) * place, bytes([_GUARD]) * rest
        with memoryview(ring.buffer) as view, view[:ROOM_BYTES] as part:
            part[:] = before + expected.translate(_INVERTED) + after
            copy_to_device(address, ring.buffer.address, ROOM_BYTES, stream)
            stream.synchronize()
            handles.read(ring.context, file, address + place, LEAST_BYTES, begin)
            copy_to_host(ring.buffer.address, address, ROOM_BYTES, stream)
            stream.synchronize()
            if part != before + expected + after:
                raise CuFileError(
                    f"{handles.files.paths[file]}: {LEAST_BYTES} known bytes at {begin} came to device "
                    f"{ring.context.index} by cuFile changed, or with others beside them"
                )
