"""Another process' memory, read by cross-memory attach (process_vm_readv): over when it has ended, nothing to fence."""

from collections.abc import Iterable

def read_attached(
    pid: int,
    local_addresses: Iterable[int],
    remote_addresses: Iterable[int],
    lengths: Iterable[int],
    *,
    hashed: bool = True,
) -> bytes:
    """Copies stretches of `lengths` bytes from process `pid` (as this PID namespace counts) to addresses here.

    Returns the XXH3-64 of all of them, one after the other, as they are here afterwards: 8 bytes little-endian, as
    `mxcore.digest.xxh3_64_many` makes them; empty unless `hashed`. Releases the GIL. Thread-safe; the addresses here
    are the caller's to keep mapped. The process may be another one by now than was meant: look at the digest.

    Raises OSError: ESRCH (no such process), EPERM (it may not be read), EFAULT (not mapped, on either side); some
    bytes may have been copied. ValueError: not as many addresses as lengths, no process, nothing to hash.
    """

def allow_attaching() -> bool:
    """Lets any process of this user read this one's memory also where Yama keeps that for its ancestors.

    That is kernel.yama.ptrace_scope = 1, Ubuntu's default; UCX does the same for its own cross-memory attach. Returns
    whether Yama was told: False where there is none, and nothing to allow. Holds for this process until it ends.
    """

class AttachedReads:
    """Reads of chunks by threads of its own, which never wait for Python. Thread-safe.

    There may be fewer than `threads` (1 to 64). Closed with `close`, or when it is no more used; after a fork the
    child's copy does nothing.

    Raises ValueError for other numbers, OSError when no thread can be started.
    """

    def __init__(self, pid: int, *, threads: int, hashed: bool) -> None: ...
    def ask(
        self, key: int, local_addresses: Iterable[int], remote_addresses: Iterable[int], lengths: Iterable[int]
    ) -> None:
        """Has one thread read these stretches, as `read_attached`; the first asked for are the first begun.

        `key` (64 bits) says which they are. Raises ValueError: closed, nothing to read, not as many addresses as
        lengths.
        """

    def ended(self, seconds: float = -1.0) -> list[tuple[int, int, bytes]]:
        """Waits for so long at most (below 0: for ever); takes all that has ended: key, errno or 0, digest.

        The digest is empty unless hashed. Empty also when nothing is asked for that was not taken, when it is closed,
        and after `wake`.
        """

    def wake(self) -> None:
        """Makes `ended` return, or the next one if nobody waits in it. From any thread."""

    def close(self, seconds: float = -1.0) -> bool:
        """Drops what was not begun, and waits for the rest for so long at most (below 0: however long it takes).

        True: nothing is written here any more. False: the kernel has not returned yet, and may still write; this object
        then stays for ever, or until another `close` returns True. Takes no more chunks either way.
        """
