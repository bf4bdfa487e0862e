"""The errors of the compiled core and of the transfer; the root is `mxserver.wire.errors.MxError`.

::

    MxError
    ├── NotBuilt              MX_NOT_BUILT            the compiled core is missing
    ├── SafetensorsError      MX_SAFETENSORS_*        one class a broken rule (mxcore.safetensors.errors)
    ├── StorageError          MX_STORAGE              reading a file failed
    │   ├── TruncatedRead     MX_TRUNCATED_READ       the file ended before the range did
    │   ├── FileChanged       MX_FILE_CHANGED         the file was written to while it was read
    │   ├── ModeUnavailable   MX_READ_MODE            the read mode that was asked for does not work here
    │   └── ObjectStoreError  MX_OBJECT_STORE         an object store gave no bytes, or not these
    │       ├── ObjectMissing     MX_OBJECT_MISSING       no such bucket, prefix or object
    │       ├── ObjectDenied      MX_OBJECT_DENIED        credentials that are wrong or too weak
    │       ├── ObjectCredentials MX_OBJECT_CREDENTIALS   credentials that are absent or have expired
    │       ├── WrongRegion       MX_OBJECT_REGION        the bucket lies in another region
    │       ├── StoreUnreachable  MX_OBJECT_ENDPOINT      no such endpoint, or none that speaks this protocol
    │       ├── StoreTimeout      MX_OBJECT_TIMEOUT       no answer in time, or it broke off, again and again
    │       ├── ObjectTruncated   MX_OBJECT_TRUNCATED     fewer bytes than the listing promised
    │       └── StreamerMissing   MX_STREAMER_MISSING     the packages for this kind of store are not installed
    ├── CheckpointError       MX_CHECKPOINT           the files are not one checkpoint
    ├── SignatureError        MX_SIGNATURE            a model that has to be signed cannot be verified
    │   ├── SignatureInvalid  MX_SIGNATURE_INVALID    no signature, or none by the key that is trusted
    │   └── SignedFileMismatch MX_SIGNED_FILE_MISMATCH a file is not what was signed, or was not signed
    ├── DestinationMismatch   MX_DESTINATION_MISMATCH a tensor does not fit where it is to go
    ├── HostMemoryError       MX_HOST_MEMORY          the machine gives no (more) host memory
    │   └── HostMemoryLimit   MX_HOST_MEMORY_LIMIT    more host memory than the user's ceiling allows
    ├── MemoryDamaged         MX_MEMORY_DAMAGED       memory does not keep what was written to it
    ├── HostBufferBusy        MX_HOST_BUFFER_BUSY     closed while views of its memory exist
    ├── HostBufferClosed      MX_HOST_BUFFER_CLOSED   used after it was closed
    ├── CudaError             MX_CUDA                 a call into the CUDA driver failed
    │   ├── CudaMissing       MX_CUDA_MISSING         no usable CUDA driver or device on this machine
    │   └── DeviceMemoryError MX_DEVICE_MEMORY        the device gives no (more) memory
    ├── CuFileError           MX_CUFILE               a call into cuFile failed, or it is not what it has to be
    │   └── CuFileMissing     MX_CUFILE_MISSING       no usable libcufile on this machine
    ├── LoadPathsExhausted    MX_LOAD_PATHS_EXHAUSTED no place that weights may come from gave them
    ├── NoSource              MX_NO_SOURCE            a worker that may only receive found no source
    ├── EngineUnreachable     MX_ENGINE_UNREACHABLE   an engine gives no answer, or has no route for updates
    ├── UpdateFailed          MX_UPDATE_FAILED        a running engine did not take another version's weights
    └── TransferError         MX_TRANSFER
        ├── NixlError         MX_NIXL                 a call into NIXL failed
        │   ├── NixlMissing   MX_NIXL_MISSING         no usable NIXL on this machine
        │   └── PeerLost      MX_PEER_LOST            the peer of a transfer is gone
        ├── FenceFailed       MX_FENCE_FAILED         memory may still be written to: nobody may use or free it
        ├── TransferStalled   MX_TRANSFER_STALLED     no progress within the time-out
        │   └── SourceSlow    MX_SOURCE_SLOW          others give a holder's chunks much sooner
        ├── LayoutMismatch    MX_LAYOUT_MISMATCH      names, dtypes, shapes or strides differ
        ├── LayoutUnsupported MX_LAYOUT_UNSUPPORTED   tensors that cannot be moved
        ├── DigestMismatch    MX_DIGEST_MISMATCH      a chunk's bytes are not those of the manifest
        ├── SourceRefused     MX_SOURCE_REFUSED       the holder answered, and said no
        │   ├── NotOneSided   MX_NOT_ONE_SIDED        cross-memory attach or cuda_ipc does not work
        │   ├── NoChunkPort   MX_NO_CHUNK_PORT        the holder's chunk port cannot be reached
        │   ├── NotEncrypted  MX_NOT_ENCRYPTED        it would send in clear, or TLS to it fails
        │   └── SourceBusy    MX_SOURCE_BUSY          the holder has as many readers as it takes
        ├── ChunksMissing     MX_CHUNKS_MISSING       no holder is left that could give these chunks
        ├── HolderDraining    MX_HOLDER_DRAINING      this holder takes no new readers
        ├── HolderBusy        MX_HOLDER_BUSY          this holder has as many readers as it takes
        ├── LeaseEnded        MX_LEASE_ENDED          no such lease, or not any more
        └── SourceUnreachable MX_SOURCE_UNREACHABLE   no answer from the holder
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mxserver.wire import MxError


class NotBuilt(MxError, ImportError):
    """The compiled core is missing: imported from a source tree that was not built."""

    code = "MX_NOT_BUILT"


class StorageError(MxError):
    """Reading a file failed; the message names the file, the offset and the cause.

    `file` is its name, `offset` (bytes in the file) where the range begins, `wanted` its bytes, and `got`
    how many bytes into the range the failure lies; 0 where the file could not even be opened. `errno` is the system's
    number for the cause, 0 where there is none.
    """

    code = "MX_STORAGE"

    def __init__(
        self, message: str, *, file: str = "", offset: int = 0, wanted: int = 0, got: int = 0, errno: int = 0
    ) -> None:
        super().__init__(message)
        self.file = file
        self.offset = offset
        self.wanted = wanted
        self.got = got
        self.errno = errno


class TruncatedRead(StorageError):
    """The file ended before the range that was asked for."""

    code = "MX_TRUNCATED_READ"


class FileChanged(StorageError):
    """The file was written to while it was read: what was read is of no use."""

    code = "MX_FILE_CHANGED"


class ModeUnavailable(StorageError):
    """The read mode that was asked for does not work here; the message says why."""

    code = "MX_READ_MODE"


class ObjectStoreError(StorageError):
    """An object store gave no bytes, or not these; the message names bucket, key and cause, and no credentials."""

    code = "MX_OBJECT_STORE"


class ObjectMissing(ObjectStoreError):
    """There is no such bucket, nothing below the prefix, or no such object."""

    code = "MX_OBJECT_MISSING"


class ObjectDenied(ObjectStoreError):
    """The store refuses these credentials."""

    code = "MX_OBJECT_DENIED"


class ObjectCredentials(ObjectStoreError):
    """There are no credentials, or they have expired."""

    code = "MX_OBJECT_CREDENTIALS"


class WrongRegion(ObjectStoreError):
    """The bucket lies in another region than the one that is set."""

    code = "MX_OBJECT_REGION"


class StoreUnreachable(ObjectStoreError):
    """Nothing answers at the endpoint, or something that is no such store."""

    code = "MX_OBJECT_ENDPOINT"


class StoreTimeout(ObjectStoreError):
    """The store did not answer in time, or broke off, at every attempt."""

    code = "MX_OBJECT_TIMEOUT"


class ObjectTruncated(ObjectStoreError):
    """An object has fewer bytes than its listing promised, or was replaced while it was read."""

    code = "MX_OBJECT_TRUNCATED"


class StreamerMissing(ObjectStoreError):
    """The packages that read this kind of store are not installed; the message has the extra that brings them."""

    code = "MX_STREAMER_MISSING"


class CheckpointError(MxError):
    """The files are not one checkpoint: no index, an index that does not fit them, one name twice, no files."""

    code = "MX_CHECKPOINT"


class SignatureError(MxError):
    """A model that has to be signed (MX_MODEL_SIGNATURE) cannot be verified: no place after this one is tried."""

    code = "MX_SIGNATURE"


class SignatureInvalid(SignatureError):
    """There is no signature, or it is not by the key that is trusted."""

    code = "MX_SIGNATURE_INVALID"


class SignedFileMismatch(SignatureError):
    """A file is not what was signed; the message has the file and both digests. Or one was added, or is missing."""

    code = "MX_SIGNED_FILE_MISMATCH"


class DestinationMismatch(MxError, ValueError):
    """A tensor does not fit the memory that it is to go to: shape, dtype, device, or strides that overlap."""

    code = "MX_DESTINATION_MISMATCH"


class HostMemoryError(MxError, MemoryError):
    """The machine gives no memory of that size; the message says how much was asked for."""

    code = "MX_HOST_MEMORY"


class HostMemoryLimit(HostMemoryError):
    """Reading would hold more host memory than MX_HOST_MEMORY_LIMIT allows."""

    code = "MX_HOST_MEMORY_LIMIT"


class MemoryDamaged(MxError):
    """Memory does not keep what was written to it; the message says where that was seen."""

    code = "MX_MEMORY_DAMAGED"


class HostBufferBusy(MxError, BufferError):
    """A host buffer was to be closed while views or tensors of its memory are out."""

    code = "MX_HOST_BUFFER_BUSY"


class HostBufferClosed(MxError, BufferError):
    """A host buffer was used after it was closed."""

    code = "MX_HOST_BUFFER_CLOSED"


class CudaError(MxError):
    """A call into the CUDA driver failed; the message names the function, its error and the device.

    `status` is the driver's CUresult, 0 where no call was made.
    """

    code = "MX_CUDA"

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class CudaMissing(CudaError):
    """No CUDA driver, an unusable one, or no device; the message says where it was looked for."""

    code = "MX_CUDA_MISSING"


class DeviceMemoryError(CudaError, MemoryError):
    """The device gives no memory of that size; the message has what is free."""

    code = "MX_DEVICE_MEMORY"


class CuFileError(MxError):
    """A call into cuFile failed, or it would not read straight into device memory; loads go through the ring then.

    `status` is its CUfileOpError, 0 where there is none.
    """

    code = "MX_CUFILE"

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class CuFileMissing(CuFileError):
    """No libcufile, or one that lacks a function; the message says where it was looked for."""

    code = "MX_CUFILE_MISSING"


class LoadPathsExhausted(MxError):
    """No rung of the ladder gave a model; the message has the reason of each."""

    code = "MX_LOAD_PATHS_EXHAUSTED"


class NoSource(MxError):
    """A worker that may only receive (mx-target) got no weights; the message says for how long it waited and why."""

    code = "MX_NO_SOURCE"


class EngineUnreachable(MxError):
    """An engine gives no answer to `mx rollout`, or has no route for updates."""

    code = "MX_ENGINE_UNREACHABLE"


class UpdateFailed(MxError):
    """A running engine did not take another version's weights; the message says which it has now."""

    code = "MX_UPDATE_FAILED"


class TransferError(MxError):
    """A transfer between workers failed; nothing of it may be used unless a later step verified it."""

    code = "MX_TRANSFER"


class NixlError(TransferError):
    """A call into NIXL failed; the message names the call and NIXL's status."""

    code = "MX_NIXL"


class NixlMissing(NixlError):
    """NIXL, or its UCX backend, cannot be used on this machine; the message says what was tried."""

    code = "MX_NIXL_MISSING"


class PeerLost(NixlError):
    """The peer of a transfer is gone."""

    code = "MX_PEER_LOST"


class FenceFailed(TransferError):
    """What was abandoned may still write to this memory: it is never to be used again, nor freed."""

    code = "MX_FENCE_FAILED"


class TransferStalled(TransferError):
    """No progress within the time-out; the memory is fenced by destroying the agent."""

    code = "MX_TRANSFER_STALLED"


class SourceSlow(TransferStalled):
    """The holder is so slow that others give what it was asked for; it may be asked again later."""

    code = "MX_SOURCE_SLOW"


class LayoutMismatch(TransferError):
    """The holder's layout is not ours; the message has the first names that differ."""

    code = "MX_LAYOUT_MISMATCH"


class LayoutUnsupported(TransferError):
    """Tensors that cannot be moved, by name, with the reason."""

    code = "MX_LAYOUT_UNSUPPORTED"


class DigestMismatch(TransferError):
    """A chunk arrived with other bytes than its holder's manifest promises."""

    code = "MX_DIGEST_MISMATCH"


class SourceRefused(TransferError):
    """The holder answered and refused (draining, another source id, an ended lease)."""

    code = "MX_SOURCE_REFUSED"


class NotOneSided(SourceRefused):
    """Cross-memory attach or cuda_ipc does not work with this holder; it can still WRITE."""

    code = "MX_NOT_ONE_SIDED"


class NoChunkPort(SourceRefused):
    """The holder's chunk port cannot be reached, or does not answer; the holder can still WRITE."""

    code = "MX_NO_CHUNK_PORT"


class NotEncrypted(SourceRefused):
    """The holder gives chunks in clear only, or no TLS connection to it comes about; this worker takes them by TLS."""

    code = "MX_NOT_ENCRYPTED"


class SourceBusy(SourceRefused):
    """The holder has as many readers as it takes; it may have room later."""

    code = "MX_SOURCE_BUSY"
    again_seconds: float = 0.0
    """When the holder wants to be asked again; 0: it did not say."""
    had_chunks: int | None = None
    """How many chunks the holder had; None: it did not say."""


class ReceivedInPart(Protocol):
    """What `ChunksMissing` left in memory, to be completed from elsewhere (mxcore.transfer.receive.partial)."""

    @property
    def total_bytes(self) -> int:
        """Of all chunks."""

    @property
    def missing_bytes(self) -> int:
        """Of the chunks that did not come."""

    def missing_stretches(self) -> list[tuple[int, int]]:
        """The memory to be filled: (first address, address after the last), ascending, none adjoining."""

    def complete(self) -> Any:
        """The report of the whole receive, once that memory was filled. Raises DigestMismatch."""


class ChunksMissing(TransferError):
    """No holder is left that could give the rest; the message has every holder's failure.

    `missing` are the chunks that did not come, ascending; the others are verified and in place. `failures` are the
    errors of the holders, in their order. `partial` can be completed from elsewhere; None when nothing came.
    """

    code = "MX_CHUNKS_MISSING"

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[int] = (),
        failures: Sequence[TransferError] = (),
        partial: ReceivedInPart | None = None,
    ) -> None:
        super().__init__(message)
        self.partial = partial
        self.missing = tuple(missing)
        self.failures = tuple(failures)


class HolderBusy(TransferError):
    """This holder has as many readers as it takes."""

    code = "MX_HOLDER_BUSY"


class HolderDraining(TransferError):
    """This holder is about to leave and takes no new readers."""

    code = "MX_HOLDER_DRAINING"


class LeaseEnded(TransferError):
    """No such lease: it was released, it expired, or it never was."""

    code = "MX_LEASE_ENDED"


class SourceUnreachable(TransferError):
    """No answer from the holder within the deadline."""

    code = "MX_SOURCE_UNREACHABLE"
    late: bool = False
    """Whether the deadline passed: the holder may be there all the same, and busy."""
