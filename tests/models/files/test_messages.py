"""FileChunk by hand, against protobuf's own encoder and decoder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxserver.models import ModelKey, digest_fd, model_name
from mxserver.models.cache import Limits
from mxserver.models.cache.eviction import Candidate, Room, evictable_bytes, eviction_order
from mxserver.models.digests import git_blob_sha1
from mxserver.models.message import FileTooShort, chunk_message
from mxserver.setting_values import parse_bytes
from mxserver.wire.proto import model_pb2
from tests.models.conftest import digest_of

CHUNKS = st.builds(
    model_pb2.FileChunk,
    relative_path=st.text(max_size=20),
    data=st.binary(max_size=300),
    offset=st.integers(0, 2**64 - 1),
    total_size=st.integers(0, 2**64 - 1),
    is_last_chunk=st.booleans(),
    is_last_file=st.booleans(),
    commit_hash=st.none() | st.text(max_size=5),
    digest=st.none() | st.text(max_size=5),
)


@given(CHUNKS, st.integers(0, 10_000))
def test_messages_are_what_protobuf_makes(chunk: model_pb2.FileChunk, offset: int) -> None:
    handle = os.memfd_create("file")
    try:
        os.pwrite(handle, chunk.data, offset)
        os.ftruncate(handle, offset + len(chunk.data))
        fields = model_pb2.FileChunk()
        fields.CopyFrom(chunk)
        fields.ClearField("data")
        message = chunk_message(fields.SerializeToString(), handle, offset, len(chunk.data))
        assert model_pb2.FileChunk.FromString(message) == chunk
        with pytest.raises(FileTooShort):
            chunk_message(b"", handle, offset, len(chunk.data) + 1)
    finally:
        os.close(handle)


@pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, 2_097_152])
def test_lengths_around_the_steps_of_a_varint(tmp_path: Path, size: int) -> None:
    (tmp_path / "f").write_bytes(os.urandom(size))
    with (tmp_path / "f").open("rb") as file:
        message = chunk_message(b"", file.fileno(), 0, size)
    assert digest_of(model_pb2.FileChunk.FromString(message).data) == digest_of((tmp_path / "f").read_bytes())


def test_digests_are_those_of_the_field(tmp_path: Path) -> None:
    """Known values: XXH3-64 of nothing, git's hash of an empty blob."""
    (tmp_path / "empty").touch()
    git = git_blob_sha1(0)
    with (tmp_path / "empty").open("rb") as file:
        assert digest_fd(file.fileno(), git) == (0, "xxh3-64:2d06800538d394c2")
    assert git.hexdigest() == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def candidate(number: int, used: float, places: dict[str, int]) -> Candidate:
    return Candidate(ModelKey(model_name(model_pb2.HUGGING_FACE, f"org/m{number}"), "a" * 40), used, places)


def test_eviction_order_and_what_it_frees() -> None:
    first, second = candidate(1, 5.0, {"x": 10, "s": 7}), candidate(2, 1.0, {"y": 20, "s": 7})
    assert eviction_order([first, second]) == [second, first]
    assert evictable_bytes([first, second], set()) == 37
    assert evictable_bytes([first, second], {"s"}) == 30


@pytest.mark.parametrize(
    ("room", "limits", "missing"),
    [
        (Room(50, 1000, 40), Limits(), 0),
        (Room(50, 1000, 40), Limits(max_bytes=90), 0),
        (Room(50, 1000, 40), Limits(max_bytes=80), 10),
        (Room(50, 30, 40), Limits(), 10),
        (Room(50, 100, 40), Limits(min_free_bytes=70), 10),
        (Room(50, 100, 40), Limits(max_bytes=60, min_free_bytes=70), 30),
    ],
)
def test_missing_bytes(room: Room, limits: Limits, missing: int) -> None:
    assert room.missing_bytes(limits) == missing


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123", 123),
        ("10GiB", 10 * 2**30),
        ("1.5 TB", 1_500_000_000_000),
        ("2k", 2000),
        ("7B", 7),
        ("1Mi", 2**20),
    ],
)
def test_bytes_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 GiB more", "1XB", "1e9"])
def test_bytes_that_are_left_to_be_refused(text: str) -> None:
    assert parse_bytes(text) == text
