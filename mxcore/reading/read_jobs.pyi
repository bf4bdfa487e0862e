"""What is to be read, cut into jobs, compiled. The words part, job and piece: mxcore/reading/read_parts.h."""

from array import array
from typing import final

from mxcore.reading.file_set import FileSet

PART_COLUMNS: int

@final
class JobList:
    """Parts of files and their destinations, checked, and cut into jobs. Immutable; keeps `files` and `parts` alive.

    `parts` is an array of int64, seven a part: index of the file, offset, bytes of a run, distance of the runs in the
    file, their number, address of the first one's destination, distance of the destinations. All bytes and counts are
    1 or more, and runs of one part do not overlap. Without `groups` parts are cut into jobs of up to `piece_bytes` (a
    power of two from 4096 to 2**30), in the order given; runs up to `gap_bytes` apart may be read together. `groups`
    has one value more than there are groups: parts groups[i] to groups[i + 1] are one job with one digest.

    Raises ValueError for parts that are not as said, TruncatedRead for one that goes beyond its file.
    """

    def __init__(
        self,
        files: FileSet,
        parts: array[int],
        *,
        piece_bytes: int = ...,
        gap_bytes: int = ...,
        groups: array[int] | None = None,
    ) -> None: ...
    @property
    def files(self) -> FileSet: ...
    @property
    def total_bytes(self) -> int:
        """What goes to destinations."""

    @property
    def digest_count(self) -> int: ...
    def __len__(self) -> int: ...
    def resident(self, by_reading: bool = False) -> bytearray:
        """For each job how much of its first piece is in the page cache, by four samples: 0 (none) to 255 (all).

        It asks mincore, which wants the files mapped (else: 0), and says 255 for all of a file that this user can only
        read. `by_reading` asks by reads that do not wait: the truth for those too, at a page read for each sample.
        """
