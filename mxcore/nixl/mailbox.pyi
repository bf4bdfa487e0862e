"""Numbers that one thread leaves for another; compiled code puts and waits without the GIL."""

class Mailbox:
    """Numbers of 64 bits, in the order in which they came. Any thread puts and wakes; one takes."""

    def __init__(self) -> None: ...
    def put(self, number: int) -> None:
        """Leaves a number."""

    def wake(self) -> None:
        """Makes the `take` that waits, or the next one, return at once."""

    def take(self, seconds: float) -> list[int]:
        """All numbers that are there; waits for one, or to be woken, for so long at most, without the GIL."""
