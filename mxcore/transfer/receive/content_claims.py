"""What the holders of one identity say that its bytes are, and whom a receiver believes when they differ.

A difference proves that some holder is wrong, by broken memory for instance. It is never settled by who answered
first. This guards against faults, not against hostile workers: those can be many (docs/explanation/threat-model.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from mxcore.transfer.layout import DIGEST_BYTES, ChunkDigests, Scalars

__all__ = ["Content", "ContentClaims"]

_FEWEST_BELIEVED = 2  # holders that made the same digests themselves, where others disagree
_NAMED_HOLDERS = 5


@dataclass(frozen=True)
class Content:
    """Which bytes a layout has: the digests of its chunks, and the numbers that belong to them."""

    digests: ChunkDigests
    scalars_digest: str
    scalars: Scalars

    def same_as(self, other: Content) -> bool:
        """Whether chunks of both have the same bytes."""
        return (self.digests, self.scalars_digest) == (other.digests, other.scalars_digest)

    def differences(self, other: Content) -> int:
        """The set of chunks whose digests differ; both have as many."""
        count = len(self.digests.values) // DIGEST_BYTES
        found = 0
        for chunk in range(count):
            if self.digests.of_chunk(chunk) != other.digests.of_chunk(chunk):
                found |= 1 << chunk
        return found


@dataclass
class _Claim:
    content: Content
    made_by: dict[str, str]  # holders that made these digests of what they read from storage themselves → their names
    repeated_by: set[str]  # holders that received them, or the raw weights

    @property
    def makers(self) -> int:
        """Those that made them, each under another name."""
        return len(set(self.made_by.values()))

    def __str__(self) -> str:
        return f"made by {_names(set(self.made_by))}, repeated by {_names(self.repeated_by)}"


class ContentClaims:
    """What each holder said first. Not thread-safe."""

    def __init__(self) -> None:
        self._claims: list[_Claim] = []
        self._heard: set[str] = set()

    def note(self, holder: str, content: Content, *, made_here: bool, owner: str = "") -> None:
        """Records a holder's content; only its first counts. `made_here`: it read storage itself.

        `owner` is the name that the server has authenticated, which counts once, however many holders have it; without
        any, each holder counts.
        """
        if holder in self._heard:
            return
        self._heard.add(holder)
        claim = next((claim for claim in self._claims if claim.content.same_as(content)), None)
        if claim is None:
            claim = _Claim(content, {}, set())
            self._claims.append(claim)
        if made_here:
            claim.made_by[holder] = f"owner {owner}" if owner else f"worker {holder}"
        else:
            claim.repeated_by.add(holder)

    def discredit(self, holder: str) -> None:
        """Drops the claim of a holder that does not have what its own digests promise."""
        for claim in self._claims:
            claim.made_by.pop(holder, None)
            claim.repeated_by.discard(holder)
        self._claims = [claim for claim in self._claims if claim.made_by or claim.repeated_by]

    @property
    def holders(self) -> list[str]:
        """Whose claims there are."""
        return sorted(set().union(*({*claim.made_by, *claim.repeated_by} for claim in self._claims)))

    @property
    def disputed(self) -> bool:
        """Whether two holders differ."""
        return len(self._claims) > 1

    @property
    def scalars_disputed(self) -> bool:
        """Whether they differ in numbers, which no chunk has."""
        return len({claim.content.scalars_digest for claim in self._claims}) > 1

    def disputed_chunks(self) -> int:
        """The set of chunks of which holders have different digests."""
        found = 0
        for claim in self._claims[1:]:
            found |= self._claims[0].content.differences(claim.content)
        return found

    def digests_of(self, chunk: int) -> set[bytes]:
        """What holders say that this chunk's digest is."""
        return {claim.content.digests.of_chunk(chunk) for claim in self._claims}

    def believed(self) -> Content | None:
        """The content to take: the only one, or that of more than half of those that made digests, and of two at least.

        None where nobody can be believed.
        """
        if not self._claims:
            return None
        if not self.disputed:
            return self._claims[0].content
        most = max(self._claims, key=lambda claim: claim.makers)
        makers = sum(claim.makers for claim in self._claims)
        count = most.makers
        return most.content if count >= _FEWEST_BELIEVED and 2 * count > makers else None

    def __str__(self) -> str:
        return "; ".join(f"digests {number}: {claim}" for number, claim in enumerate(self._claims, 1))


def _names(holders: set[str]) -> str:
    named = ", ".join(sorted(holders)[:_NAMED_HOLDERS]) or "nobody"
    return named + (f" and {len(holders) - _NAMED_HOLDERS} more" if len(holders) > _NAMED_HOLDERS else "")
