"""Holders that have different bytes under one identity: decided, never by who answered first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from mxcore.errors import ChunksMissing, DigestMismatch
from mxcore.settings import load_settings
from mxcore.transfer.layout import XXH3, ChunkDigests, build_layout
from mxcore.transfer.member import Membership
from mxcore.transfer.move import Source
from mxcore.transfer.receive import ReceivedChunks, ReceiveReport
from mxcore.transfer.receive.content_claims import Content, ContentClaims
from tests.transfer.memory import HostTensors, identity, model_specs

SEED = 7
CHUNK_BYTES = 65536
SETTINGS = {"MX_TRANSPORT": "tcp", "MX_STALL_TIMEOUT_SECS": 20, "MX_WORKER_GRPC_PORT": 0, "MX_DRAIN_TIMEOUT_SECS": 1}
RECEIVES = 12

RIGHT = HostTensors(model_specs(1), SEED)


class Worker:
    """A worker with a model of one seed; `flipped`: a bit of it was before its digests were made."""

    def __init__(self, seed: int | None, *, flipped: bool = False) -> None:
        self.tensors = HostTensors(model_specs(1), seed)
        if flipped:
            self.tensors.storages["layer0"][1234] ^= 0x40
        self.layout, self.placement = build_layout("raw", self.tensors.local_tensors())
        self.membership = Membership(load_settings(SETTINGS, {}), identity(), 0, "cpu", chunk_bytes=CHUNK_BYTES)

    def serve(self, digests: ChunkDigests | None = None) -> Source:
        self.membership.serve(self.layout, self.placement, {}, digests, keep_alive=self.tensors)
        return Source(self.membership.source_id, self.membership.worker_id, 0, self.membership.endpoint or "")

    def receive(self, *sources: Source, files_decide: bool = False) -> ReceiveReport:
        return self.membership.receive(self.layout, self.placement, {}, sources, files_decide=files_decide)

    @property
    def is_right(self) -> bool:
        return self.tensors.equal_bytes(RIGHT)


NewWorker = Callable[..., Worker]


@pytest.fixture
def new_worker() -> Iterator[NewWorker]:
    with ExitStack() as stack:

        def new(seed: int | None = None, *, flipped: bool = False) -> Worker:
            worker = Worker(seed, flipped=flipped)
            stack.callback(worker.membership.close)
            return worker

        yield new


def test_of_three_holders_one_with_a_flipped_bit_is_never_believed(new_worker: NewWorker) -> None:
    sources = [new_worker(SEED, flipped=number == 2).serve() for number in range(3)]
    for turn in range(RECEIVES):
        target = new_worker()
        report = target.receive(*sources[turn % 3 :], *sources[: turn % 3])
        assert target.is_right
        assert report.bytes_otherwise == 0
        target.membership.close()


def test_of_two_that_differ_nobody_is_believed(new_worker: NewWorker) -> None:
    sources = [new_worker(SEED, flipped=flipped).serve() for flipped in (False, True)]
    with pytest.raises(ChunksMissing, match="different bytes") as raised:
        new_worker().receive(*sources)
    assert raised.value.partial is None
    assert len(raised.value.missing) == 1


def test_workers_that_repeat_the_digests_of_another_are_no_majority(new_worker: NewWorker) -> None:
    bad = new_worker(SEED, flipped=True)
    bad.serve()
    made = bad.membership.holder
    assert made is not None
    repeating = [new_worker(SEED, flipped=True).serve(made.digests) for _ in range(2)]
    target = new_worker()
    with pytest.raises(ChunksMissing, match="different bytes"):
        target.receive(*repeating, new_worker(SEED).serve())


def test_the_files_decide_for_the_disputed_chunk_alone(new_worker: NewWorker) -> None:
    sources = [new_worker(SEED, flipped=flipped).serve() for flipped in (True, False)]
    target = new_worker()
    with pytest.raises(ChunksMissing) as raised:
        target.receive(*sources, files_decide=True)
    partial = raised.value.partial
    assert partial is not None
    assert partial.missing_bytes == CHUNK_BYTES
    target.tensors.copy_from(RIGHT, partial.missing_stretches())
    report = partial.complete()
    assert target.is_right
    assert report.bytes_otherwise == CHUNK_BYTES
    right = new_worker(SEED)
    right.serve()
    assert right.membership.holder is not None
    assert report.digests == right.membership.holder.digests


def test_files_that_no_holder_has_are_refused(new_worker: NewWorker) -> None:
    sources = [new_worker(SEED, flipped=flipped).serve() for flipped in (True, False)]
    target = new_worker()
    with pytest.raises(ChunksMissing) as raised:
        target.receive(*sources, files_decide=True)
    partial = raised.value.partial
    assert partial is not None
    target.tensors.copy_from(HostTensors(model_specs(1), SEED + 1), partial.missing_stretches())
    with pytest.raises(DigestMismatch):
        partial.complete()


def test_one_wrong_chunk_is_asked_for_once_more(new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    source = new_worker(SEED).serve()
    target = new_worker()
    verify, wrong = ReceivedChunks.verify, [1]

    def once_wrong(self: ReceivedChunks, chunk: int, made: bytes | None = None) -> bool:
        if wrong and chunk == wrong[0]:
            wrong.pop()
            return False
        return verify(self, chunk, made)

    monkeypatch.setattr(ReceivedChunks, "verify", once_wrong)
    report = target.receive(source)
    assert target.is_right
    assert (report.bytes_again, report.failures) == (CHUNK_BYTES, ())


def content(*digests: int) -> Content:
    values = b"".join(digest.to_bytes(8, "little") for digest in digests)
    return Content(ChunkDigests(values, XXH3), "", {})


def test_who_is_believed() -> None:
    right, wrong = content(1, 2), content(1, 3)
    claims = ContentClaims()
    assert claims.believed() is None
    claims.note("a", right, made_here=True)
    assert claims.believed() is right
    claims.note("b", wrong, made_here=False)
    assert claims.disputed
    assert claims.disputed_chunks() == 0b10
    assert claims.believed() is None  # one alone is no majority
    claims.note("c", content(1, 2), made_here=True)
    assert claims.believed() is right
    claims.note("d", wrong, made_here=True)
    claims.note("d", right, made_here=True)  # only the first counts
    assert claims.believed() is right
    claims.note("e", wrong, made_here=True)
    assert claims.believed() is None
    assert "made by a, c, repeated by nobody" in str(claims)
    claims.discredit("d")  # it has not what its own digests promise
    assert claims.believed() is right


def test_a_majority_is_one_of_authenticated_names() -> None:
    """However many holders somebody publishes under one name."""
    right, wrong = (Content(ChunkDigests(bytes([i]) * 8, XXH3), "", {}) for i in range(2))
    claims = ContentClaims()
    for holder in ("liar1", "liar2", "liar3"):
        claims.note(holder, wrong, made_here=True, owner="token-of-one-pod")
    claims.note("a", right, made_here=True, owner="pod-a")
    assert claims.believed() is None
    claims.note("b", right, made_here=True, owner="pod-b")
    assert claims.believed() is right
    claims.discredit("b")
    assert claims.believed() is None
