"""Which reason an error is, and that the server hears of each once."""

from __future__ import annotations

from mxcore import errors
from mxcore.errors import ChunksMissing, DigestMismatch, HostMemoryError, LayoutMismatch, SourceSlow, TransferError
from mxcore.transfer.member import Refusal, refusals_of
from mxcore.transfer.member.refusals import PendingRefusals
from mxserver.wire.proto import load_pb2


def kinds(kind: type[TransferError]) -> list[type[TransferError]]:
    return [kind, *(each for below in kind.__subclasses__() for each in kinds(below))]


def test_every_way_in_which_a_transfer_fails_has_a_reason_of_its_own() -> None:
    of_ours = [kind for kind in kinds(TransferError) if kind.__module__ == errors.__name__]
    reasons = {refusals_of("receive", kind("text"))[0].reason for kind in of_ours}
    assert reasons == {kind.code.removeprefix("MX_").lower() for kind in of_ours}
    assert len(reasons) == len(of_ours) > 15


def test_other_errors_are_what_their_kind_is_or_other() -> None:
    class Slower(SourceSlow):
        code = "MX_NOT_IN_THE_PROTOCOL"

    assert refusals_of("offer", Slower("x")) == [Refusal("offer", "source_slow", "x [MX_NOT_IN_THE_PROTOCOL]")]
    assert [refusals_of("offer", error)[0].reason for error in (ValueError("x"), HostMemoryError("x"))] == ["other"] * 2


def test_missing_chunks_are_what_their_holders_did() -> None:
    failures = [DigestMismatch("a"), LayoutMismatch("b"), DigestMismatch("c")]
    found = refusals_of("receive", ChunksMissing("x", failures=failures))
    assert [refusal.reason for refusal in found] == ["digest_mismatch", "layout_mismatch"]
    assert [refusal.reason for refusal in refusals_of("receive", ChunksMissing("x"))] == ["chunks_missing"]


def test_what_was_told_is_not_told_again_and_what_was_not_is_bounded() -> None:
    pending = PendingRefusals()
    pending.add([Refusal("offer", "memory_moves", "y" * 10_000)])
    [told] = pending.pending()
    assert (told.side, told.reason) == (load_pb2.REFUSAL_SIDE_OFFER, load_pb2.REFUSAL_REASON_MEMORY_MOVES)
    assert (len(told.text), len(told.id)) == (500, 32)
    pending.add([Refusal("receive", "other", "z")])
    pending.told([told])
    assert [refusal.text for refusal in pending.pending()] == ["z"]
    pending.add([Refusal("receive", "other", str(number)) for number in range(100)])
    assert [refusal.text for refusal in pending.pending()] == [str(number) for number in range(68, 100)]
