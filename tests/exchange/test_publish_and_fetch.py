"""publish and fetch over a real server and real sockets: versions, names, waiting, memory that exists, refusals."""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import pytest

from mxcore import MxError, fetch, publish
from mxcore.errors import ChunksMissing, LayoutMismatch, LayoutUnsupported, NoSource, SourceUnreachable
from mxcore.transfer.serve import SelfCheck
from mxserver.wire import ServerUnreachable, SettingError
from tests.transfer.conftest import wait_for

Arrays = dict[str, Any]
At = dict[str, Any]


def arrays(seed: int = 0, rows: int = 64) -> Arrays:
    """Some MB of several types and shapes: large, small, empty, a scalar."""
    random = np.random.default_rng(seed)
    large = {f"layers.{number}": random.standard_normal((rows, 1024), dtype=np.float32) for number in range(8)}
    return large | {
        "half": random.standard_normal((3, 5)).astype(np.float16),
        "counts": np.arange(7),
        "transposed": random.integers(0, 255, (16, 9), np.uint8).T,
        "scale": np.array(seed + 0.5),
        "nothing": np.empty((0, 4), np.float32),
    }


def assert_equal(found: Any, wanted: Arrays) -> None:
    assert sorted(found) == sorted(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array, err_msg=name)


def test_what_is_published_is_fetched_until_the_block_ends(at: At, name: str) -> None:
    weights = arrays()
    with publish(name, weights, version=3, **at) as published:
        found = fetch(name, 3, framework="numpy", **at)
        assert published.total_bytes == found.report.bytes == sum(array.nbytes for array in weights.values())
        assert (published.version, found.version, found.sharing) == ("3", "3", False)
    assert_equal(found, weights)
    assert found["transposed"].strides == weights["transposed"].strides
    assert (published.endpoint, published.total_bytes) == (None, 0)
    with pytest.raises(NoSource, match=r"nobody has version 3 .* nothing is published under that name"):
        fetch(name, 3, **at)
    published.close()


def test_two_versions_at_once_and_the_newest(at: At, name: str) -> None:
    old, new = arrays(1), arrays(2)
    with publish(name, old, version=9, **at), publish(name, new, version=10, **at):
        assert_equal(fetch(name, 9, framework="numpy", **at), old)
        newest = fetch(name, framework="numpy", **at)
        assert newest.version == "10"
        assert_equal(newest, new)
        assert fetch(name, newer_than=9, names=["scale"], **at).version == "10"
        with pytest.raises(NoSource, match=r"a version after 10 .*: there is 10, 9"):
            fetch(name, newer_than=10, **at)
        with pytest.raises(NoSource, match=r"nobody has version 11 .*: there is 10, 9"):
            fetch(name, "11", **at)
        with publish(name, new, version="main", **at), pytest.raises(NoSource, match="without an order"):
            fetch(name, **at)


def test_names_and_versions_are_told_apart_by_case(at: At, name: str) -> None:
    with publish(name, arrays(1), version="A", **at), pytest.raises(NoSource, match="there is A"):
        fetch(name, "a", **at)


def test_ranks_have_their_own(at: At, name: str) -> None:
    parts = [arrays(rank) for rank in range(2)]
    with publish(name, parts[0], 1, rank=0, **at), publish(name, parts[1], 1, rank=1, **at) as second:
        assert second.rank == 1
        for rank, part in enumerate(parts):
            assert_equal(fetch(name, 1, rank=rank, framework="numpy", **at), part)
        with pytest.raises(NoSource, match="for rank 2"):
            fetch(name, 1, rank=2, **at)


def test_a_version_is_waited_for(at: At, name: str) -> None:
    weights, found = arrays(), []
    waiting = threading.Thread(target=lambda: found.append(fetch(name, 4, wait_seconds=60, framework="numpy", **at)))
    waiting.start()
    with publish(name, weights, version=4, **at):
        waiting.join(60)
        assert_equal(found[0], weights)


def test_some_names_cost_little_more_than_their_bytes(at: At, name: str) -> None:
    weights = arrays(rows=1024)
    told: list[tuple[int, int]] = []
    with publish(name, weights, version=1, **at):
        found = fetch(
            name, 1, names={"layers.3", "counts"}, framework="numpy", progress=lambda *now: told.append(now), **at
        )
        assert_equal(found, {"layers.3": weights["layers.3"], "counts": weights["counts"]})
        assert found.report.bytes <= weights["layers.3"].nbytes + 4 * 524288
        assert told[-1] == (found.report.bytes, found.report.bytes)
        assert fetch(name, 1, names=["nothing"], framework="numpy", **at)["nothing"].shape == (0, 4)
        with pytest.raises(LayoutMismatch, match=r"layers\.99: not published"):
            fetch(name, 1, names=["layers.3", "layers.99"], **at)
        with pytest.raises(SettingError, match="a collection of names"):
            fetch(name, 1, names="layers.3", **at)


def test_memory_that_exists_is_filled(at: At, name: str) -> None:
    """Straight where it lies alike, by a copy where it does not; some of it with `names`."""
    weights = arrays()
    alike = {key: np.zeros_like(array) for key, array in weights.items()}
    other = {key: np.zeros((*array.shape, 2), array.dtype)[..., 0] for key, array in weights.items()}
    with publish(name, weights, version=1, **at):
        found = fetch(name, 1, into=alike, **at)
        assert all(found[key] is alike[key] for key in weights)
        assert_equal(alike, weights)
        assert_equal(fetch(name, 1, into=other, **at), weights)
        part = {"scale": np.zeros(())}
        assert fetch(name, 1, into=part, names=["scale"], **at)["scale"] is part["scale"]
        assert part["scale"] == weights["scale"]


def test_memory_that_is_read_only_is_refused(at: At, name: str) -> None:
    into = {"a": np.zeros(4)}
    into["a"].flags.writeable = False
    with publish(name, {"a": np.ones(4)}, version=1, **at), pytest.raises(LayoutUnsupported, match="it is read-only"):
        fetch(name, 1, into=into, **at)
    assert not into["a"].any()


def test_types_that_numpy_lacks_keep_their_order_in_memory_that_exists(at: At, name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="numpy's bfloat16 is its")
    halves = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16).T
    into = {"a": np.zeros((4, 3), ml_dtypes.bfloat16)}
    with publish(name, {"a": halves}, version=1, **at):
        fetch(name, 1, into=into, **at)
    np.testing.assert_array_equal(into["a"].astype(np.float32), halves.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale": None}, "scale: published, and not here"),
        ({"more": np.zeros(3)}, "more: only here"),
        ({"scale": np.zeros(2)}, r"scale: torch.float64 \(2,\) here, torch.float64 \(\) there"),
        ({"scale": np.zeros((), "f4")}, r"scale: torch.float32 \(\) here, torch.float64 \(\) there"),
    ],
)
def test_memory_for_other_tensors_is_refused_by_name(at: At, name: str, change: Arrays, said: str) -> None:
    weights = arrays(rows=1)
    into = {key: np.zeros_like(array) for key, array in weights.items()} | change
    into = {key: array for key, array in into.items() if array is not None}
    with publish(name, weights, version=1, **at):
        with pytest.raises(LayoutMismatch, match=said):
            fetch(name, 1, into=into, **at)
        assert not into["layers.0"].any()


def test_a_copy_may_be_changed_under_the_publisher(at: At, name: str) -> None:
    weights, before = arrays(), arrays()
    with publish(name, weights, version=1, copy=True, **at):
        weights["layers.0"][:] = 0
        assert_equal(fetch(name, 1, framework="numpy", **at), before)


def test_a_flipped_byte_is_refused(at: At, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SelfCheck, "start", lambda check: None)  # else the publisher may be the first to notice
    weights = arrays()
    with publish(name, weights, version=1, **at):
        weights["layers.5"].view(np.uint8)[3, 1234] ^= 1
        with pytest.raises(ChunksMissing, match="is not what its digest promises"):
            fetch(name, 1, **at)


def test_what_its_publisher_withdrew_is_told_at_once(at: At, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """And waited for only where that was asked for: another process may publish it again."""
    weights, found = arrays(), []
    said = r"worker \w+ withdrew it: chunks \[\d+\] of the weights in memory are not what their digests promise"
    with publish(name, weights, version=1, **at) as bad:
        weights["layers.5"].view(np.uint8)[3, 1234] ^= 1
        assert re.fullmatch(r"chunks \[\d+\] of the weights in memory .*", wait_for(lambda: bad.withdrawn))
        assert "withdrawn, chunks" in repr(bad)
        for version in (1, None):
            with pytest.raises(NoSource, match=said):
                fetch(name, version, **at)
        caplog.clear()
        waiting = threading.Thread(
            target=lambda: found.append(fetch(name, 1, wait_seconds=60, framework="numpy", **at))
        )
        waiting.start()
        wait_for(lambda: f"version 1 of '{name}' was withdrawn by its publisher {bad.worker_id}" in caplog.text)
        with publish(name, arrays(), version=1, **at):
            waiting.join(60)
            assert_equal(found[0], arrays())


def test_publishers_of_one_version_that_differ_are_not_believed(at: At, name: str) -> None:
    """Neither of two; with a third one, the two that are equal."""
    right, wrong = arrays(1), arrays(1)
    wrong["layers.2"][0, 0] += 1
    with publish(name, right, 1, **at), publish(name, wrong, 1, **at):
        with pytest.raises(ChunksMissing, match="holders have different bytes"):
            fetch(name, 1, **at)
        with publish(name, right, 1, **at):
            assert_equal(fetch(name, 1, framework="numpy", **at), right)


def test_publishers_of_one_version_with_other_tensors_are_not_believed(at: At, name: str) -> None:
    """Whichever answers first."""
    small, large = arrays(rows=1), arrays(rows=2)
    with publish(name, small, 1, **at), publish(name, large, 1, **at):
        with pytest.raises(LayoutMismatch, match="other tensors are published under this name and version too"):
            fetch(name, 1, **at)
        for like in (small, large):
            with pytest.raises(LayoutMismatch, match="other tensors are published"):
                fetch(name, 1, into={key: np.zeros_like(array) for key, array in like.items()}, **at)


def test_a_version_whose_publisher_has_just_died_is_waited_for(at: At, name: str) -> None:
    """The server lists the dead one until its lease ends."""
    weights = arrays()
    dead = publish(name, arrays(1), 1, **at)
    dead._member._stop_serving()
    with pytest.raises(SourceUnreachable):
        fetch(name, 1, **at)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(fetch(name, 1, wait_seconds=60, framework="numpy", **at)))
    waiting.start()
    with publish(name, weights, 1, **at):
        waiting.join(60)
        assert_equal(found[0], weights)
    dead.close()


def test_what_shares_serves_when_the_publisher_has_left(at: At, name: str) -> None:
    weights = arrays()
    published = publish(name, weights, 1, **at)
    with fetch(name, 1, framework="numpy", share=True, **at) as shared:
        published.close()
        assert shared.sharing
        assert_equal(fetch(name, 1, framework="numpy", **at), weights)
    assert not shared.sharing
    assert_equal(shared, weights)
    with pytest.raises(NoSource):
        fetch(name, 1, **at)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "there are no tensors"),
        ([1.0], "as a dict by name or as an nn.Module, not as list"),
        ({"a": 1.0, "b": np.zeros(1)}, r"no torch or numpy tensors, nor .*: 'a' \(float\)"),
        ({"a": np.zeros((4, 4))[:, :2]}, r"'a' \(there are gaps between its elements"),
        ({"a": np.zeros(4)[::-1]}, r"'a' \(a negative stride\)"),
        ({"a": np.zeros(4, ">f4")}, r"'a' \(dtype >f4\)"),
        ({"a": np.zeros(4, object)}, r"'a' \(dtype object\)"),
    ],
)
def test_what_cannot_be_published_is_named(at: At, name: str, given: Any, said: str) -> None:
    with pytest.raises(LayoutUnsupported, match=said):
        publish(name, given, 1, **at)


def test_names_versions_and_settings_are_checked_first(at: At) -> None:
    weights = {"a": np.zeros(1)}
    with pytest.raises(SettingError, match=r"the name .* is empty"):
        publish("", weights, 1, **at)
    for version in ("", -1, True):
        with pytest.raises(SettingError, match="a whole number from 0 on"):
            fetch("x", version, **at)
    with pytest.raises(SettingError, match="exclude each other"):
        fetch("x", 1, newer_than=0, **at)
    with pytest.raises(SettingError, match="device='mps': host memory"):
        fetch("x", 1, device="mps", **at)
    with pytest.raises(SettingError, match="device='cuda:1' needs torch"):
        fetch("x", 1, device="cuda:1", framework="numpy", **at)
    with pytest.raises(SettingError, match="MX_TRANSPORT='carrier-pigeon' is refused"):
        publish("x", weights, 1, server=at["server"], settings={"MX_TRANSPORT": "carrier-pigeon"})
    for call in (lambda: publish("x", weights, 1), lambda: fetch("x", 1)):
        with pytest.raises(SettingError, match=r"no server: .*MODEL_EXPRESS_URL"):
            call()


def test_a_server_that_is_away_is_an_error(at: At) -> None:
    away = {**at, "server": "127.0.0.1:1"}
    for call in (lambda: publish("x", {"a": np.zeros(1)}, 1, **away), lambda: fetch("x", 1, **away)):
        with pytest.raises(ServerUnreachable) as error:
            call()
        assert isinstance(error.value, MxError)
