"""Files read in order and whole, and hashed, for those who want a part of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from mxcore.errors import SignatureError, SignedFileMismatch
from mxcore.memory import HostBuffer
from mxcore.safetensors import parse_header
from mxcore.storage.checkpoint import Checkpoint, TensorInfo, assembled
from mxcore.storage.plan import Row
from mxcore.storage.signed.manifest import SignedManifest
from mxcore.storage.signed.ordered_digests import FileDigest, HashThread

__all__ = ["LEAST_PIECE_BYTES", "OrderedReads", "ReadRows"]

ReadRows: TypeAlias = Callable[[Sequence[Row]], object]

LEAST_PIECE_BYTES = 16 * 1024 * 1024  # read, then hashed while the next one is read


class OrderedReads:
    """Reads rows, in the order of the files, into host memory, by `read`; hashes all bytes of the files.

    Call it with rows, then `end`. `files` are the checkpoint's, as (name in the manifest, size in bytes), `place` is
    what messages call their folder. `besides_bytes` were read without being asked for. One thread at a time.
    """

    def __init__(
        self,
        manifest: SignedManifest,
        place: str,
        checkpoint: Checkpoint,
        files: Sequence[tuple[str, int]],
        read: ReadRows,
        hashing: HashThread,
        *,
        piece_bytes: int = LEAST_PIECE_BYTES,
    ) -> None:
        self.besides_bytes = 0
        self._manifest = manifest
        self._place = place
        self._checkpoint = checkpoint
        self._files = files
        self._read = read
        self._hashing = hashing
        self._piece_bytes = piece_bytes
        self._tensors: dict[int, list[TensorInfo]] = {}
        for info in checkpoint.values():
            self._tensors.setdefault(info.file, []).append(info)
        self._file = -1
        self._digest: FileDigest | None = None
        self._at = 0

    def __call__(self, rows: Sequence[Row]) -> None:
        """Returns when the bytes are there and hashed. Raises SignedFileMismatch, and what reading raises."""
        try:
            self._take_in_order(sorted(piece for row in rows for piece in _pieces(row, self._piece_bytes)))
        finally:
            self._hashing.wait()

    def _take_in_order(self, rows: Sequence[Row]) -> None:
        group: list[Row] = []
        held = 0
        for row in rows:
            if group and (row[:2] != (self._file, self._at) or held + row[2] > self._piece_bytes):
                self._take(group)
                group, held = [], 0
            while self._file < row[0]:
                self._next_file()
            self._skip_to(row[1])
            group.append(row)
            held += row[2]
            self._at += row[2]
        self._take(group)

    def end(self) -> None:
        """What was not wanted of the files is read and hashed as well. Raises SignedFileMismatch."""
        while self._file < len(self._files):
            self._next_file()

    def _take(self, rows: Sequence[Row]) -> None:
        if not rows or self._digest is None:
            return
        self._read(rows)
        for row in rows:
            self._hashing.submit(self._digest, row[5], row[2])

    def _next_file(self) -> None:
        """Ends the file that is open, and begins the next."""
        if self._digest is not None:
            self._skip_to(self._files[self._file][1])
            self._hashing.wait()
            self._digest.finish()
        self._file += 1
        self._at, self._digest = 0, None
        if self._file < len(self._files):
            self._digest = FileDigest(self._manifest, self._files[self._file][0], self._place)

    def _skip_to(self, offset: int) -> None:
        """Reads and hashes what nobody wants."""
        if offset < self._at:
            raise SignatureError(f"{self._place}: bytes at {offset} of a file were asked for after those at {self._at}")
        tensors = self._tensors.get(self._file, [])
        header_bytes = min((info.offset for info in tensors), default=0)
        while self._at < offset:
            count = (
                min(offset - self._at, self._piece_bytes)
                if self._at
                else min(offset, header_bytes or self._piece_bytes)
            )
            with HostBuffer(count) as room:
                self._take([(self._file, self._at, count, 0, 1, room.address, 0)])
                self._hashing.wait()
                if self._at == 0 and tensors:
                    self._compare_header(bytes(memoryview(room)), tensors)
            self._at += count
            self.besides_bytes += count

    def _compare_header(self, data: bytes, tensors: Sequence[TensorInfo]) -> None:
        """The offsets that tensors are read from have to be those of the header that is hashed."""
        name, size_bytes = self._files[self._file]
        file = self._checkpoint.files[self._file]
        header = parse_header(data, size_bytes, file=f"{self._place}/{name}")
        found = assembled([file], [header], None, str(file))
        if any(found.tensors.get(info.name) != info._replace(file=0) for info in tensors):
            raise SignedFileMismatch(
                f"{self._place}/{name} has another header than when it was opened: nothing of it is used. Load again, "
                "once nobody writes to it"
            )


def _pieces(row: Row, piece_bytes: int) -> Iterator[Row]:
    file, offset, run_bytes, _, count, address, _ = row
    if count != 1:
        raise SignatureError("rows of several runs are not read in the order of the file")
    for at in range(0, run_bytes, piece_bytes):
        yield file, offset + at, min(piece_bytes, run_bytes - at), 0, 1, address + at, 0
