"""A model's files, verified against what was signed while they are read for loading.

A digest is of a file's bytes from the first to the last, so files are read in order, and whole: what lies between the
tensors that are wanted (headers; tensors of other ranks) is read besides. Every byte is hashed where it was read to,
before anybody is given it; no file is read a second time.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mxcore.errors import SignatureError, SignedFileMismatch
from mxcore.storage.checkpoint import Checkpoint
from mxcore.storage.load import BATCH_BYTES, stream
from mxcore.storage.plan import Progress
from mxcore.storage.remote import RemoteFolder, is_small
from mxcore.storage.signed.manifest import SignedManifest
from mxcore.storage.signed.ordered_digests import FileDigest, HashThread
from mxcore.storage.signed.ordered_reads import LEAST_PIECE_BYTES, OrderedReads, ReadRows
from mxserver.wire import WeightFiles, left_out, weight_files

__all__ = ["VerifiedFiles"]

_NOT_LOADED = (".md", ".txt.gz", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf")
_PAPERS = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_NAMED = 5


class VerifiedFiles:
    """One folder in one load: `check_others`, then `stream` for the weights, then `finish`. One thread at a time.

    All calls raise SignedFileMismatch with the file, both digests and what to do, and what reading raises.
    """

    def __init__(self, manifest: SignedManifest, folder: RemoteFolder) -> None:
        self.manifest = manifest
        self._folder = folder
        self._sizes = {file.path: file.size_bytes for file in folder.files}
        self._verified: set[str] = set()
        self._besides_bytes = self._small_bytes = 0
        self._small_seconds = 0.0
        self._hashing: list[HashThread] = []

    @cached_property
    def chosen(self) -> WeightFiles:
        """The files that the engine reads weights from."""
        return weight_files(list(self._sizes), self._folder.whole)

    def check_others(self) -> None:
        """All files but the weights: none is there that was not signed, none is missing, each is what was signed.

        Weight files that nobody loads (copies in other forms) are not read, and may be missing, as papers may.
        """
        copies = left_out(list(self.manifest.files))
        missing = [name for name in self.manifest.files if name not in self._sizes]
        if lost := sorted(name for name in missing if not (name in copies or _is_paper(name))):
            raise SignedFileMismatch(
                f"{self._folder.name} lacks files that were signed: {_some(lost)} ({self.manifest.signature}): nothing "
                "is loaded. Download the model again"
            )
        self.check_small()

    def check_small(self) -> None:
        """As `check_others`, for a folder that may lack files: one whose weights nobody reads."""
        began = time.perf_counter()
        present = [name for name in self._sizes if not (name.startswith(".") or self.manifest.leaves_out(name))]
        if added := sorted(name for name in present if name not in self.manifest.files and not name.endswith(".sig")):
            raise SignedFileMismatch(
                f"{self._folder.name} has files that were not signed: {_some(added)} ({self.manifest.signature}): "
                "nothing is loaded. Remove them, or have the model signed with them"
            )
        for name in present:
            if name in self.manifest.files and (is_small(name) or name in self.chosen.of_modules):
                self._check(name)
        self._small_seconds += time.perf_counter() - began

    def stream(
        self,
        checkpoint: Checkpoint,
        read: ReadRows,
        names: Collection[str] | None = None,
        *,
        batch_bytes: int = BATCH_BYTES,
        progress: Progress | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """Yields (name, tensor) as `mxcore.storage.load.stream`, hashed before; `read` reads the checkpoint's rows.

        The checkpoint's files are those of this folder. They are read in order and whole, and when the iteration ends
        each was what was signed; before that nothing may be made of the tensors but a copy that is thrown away.
        """
        hashing = HashThread()
        self._hashing.append(hashing)
        files = [self._name_of(file) for file in checkpoint.files]
        reads = OrderedReads(
            self.manifest,
            self._folder.name,
            checkpoint,
            [(name, self._sizes[name]) for name in files],
            read,
            hashing,
            piece_bytes=max(LEAST_PIECE_BYTES, batch_bytes // 4),
        )
        try:
            yield from stream(checkpoint, names, batch_bytes=batch_bytes, read=reads, progress=progress)
            reads.end()
        finally:
            hashing.close()  # its memory goes now
            self._besides_bytes += reads.besides_bytes
        self._verified.update(files)

    def finish(self) -> None:
        """After the weights were read. Raises SignatureError where not all of them were read by `reading`."""
        if unread := sorted({*self.chosen.files} - self._verified):
            raise SignatureError(
                f"{self._folder.name}: {_some(unread)} were not read by what verifies signatures, so nothing is "
                "used: it reads safetensors alone, for the engine's default loader"
            )

    def told(self, load_seconds: float) -> str:
        """What it has cost, for the log."""
        seconds = sum(one.seconds for one in self._hashing)
        waited = sum(one.waited_seconds for one in self._hashing) + self._small_seconds
        count = sum(one.bytes for one in self._hashing)
        share = 100 * waited / load_seconds if load_seconds > 0 else 0.0
        return (
            f"signature {self.manifest.signature} (manifest {self.manifest.digest[:16]}): {len(self._verified)} files "
            f"are what was signed: {count + self._small_bytes} bytes hashed in {seconds + self._small_seconds:.3f} s; "
            f"the load waited {waited:.3f} s of that ({share:.0f} % of {load_seconds:.3f} s); {self._besides_bytes} "
            "bytes were read besides the tensors"
        )

    def _check(self, name: str) -> None:
        digest = FileDigest(self.manifest, name, self._folder.name)
        data = self._folder.whole(name)
        digest.update(memoryview(data))
        digest.finish()
        self._small_bytes += len(data)
        self._verified.add(name)

    def _name_of(self, file: Path) -> str:
        """A file's path below the folder. Raises SignedFileMismatch for one that was not signed."""
        name = file.as_posix()
        folder = Path(self._folder.name)
        for below, of in ((file, folder), (file.parent.resolve() / file.name, folder.resolve())):
            if below.is_relative_to(of):
                name = below.relative_to(of).as_posix()
                break
        if name not in self.manifest.files or name not in self._sizes:
            raise SignedFileMismatch(
                f"{file} is none of the files that were signed ({self.manifest.signature}): nothing is loaded. Sign "
                "the model with it, or remove it"
            )
        return name


def _is_paper(name: str) -> bool:
    return name.startswith(".") or name.lower().endswith(_NOT_LOADED) or name.rpartition("/")[2].startswith(_PAPERS)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
