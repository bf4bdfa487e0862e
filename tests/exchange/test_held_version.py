"""A version held whole, as engines hold it: what is equal in the version before is not sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mxcore import fetch, publish
from mxcore.errors import NoSource
from mxcore.exchange import HeldVersion, PublishedVersion
from mxcore.exchange.versions import settings_of
from mxserver.wire import SettingError

At = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def weights(seed: int = 0) -> Tensors:
    """8 MiB in 64 chunks and more, two of them tied."""
    generator = torch.Generator().manual_seed(seed)
    found = {f"layers.{number}.weight": torch.rand(256, 1024, generator=generator) for number in range(8)}
    return {**found, "norm": torch.rand(7, generator=generator).bfloat16(), "tied": found["layers.0.weight"]}


def taken(name: str, version: int, at: At, before: HeldVersion | None = None) -> HeldVersion:
    settings = settings_of(at["server"], at["settings"])
    return PublishedVersion(name, str(version), settings).take(before)


def assert_equal(held: HeldVersion, wanted: Tensors) -> None:
    found = dict(held.tensors())
    assert sorted(found) == sorted(held.checkpoint) == sorted(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_equal_chunks_are_not_sent_and_what_is_held_is_given_to_others(at: At, name: str) -> None:
    one = weights()
    two = {**one, "layers.3.weight": one["layers.3.weight"] + 1}
    with publish(name, one, 1, **at) as first:
        before = taken(name, 1, at)
        assert before.bytes_received == first.bytes_given == first.total_bytes
    assert_equal(before, one)
    with publish(name, two, 2, **at) as second:
        after = taken(name, 2, at, before)
        size = two["layers.3.weight"].nbytes
        assert size <= after.bytes_received <= size + 2 * 128 * 1024
        assert second.bytes_given == after.bytes_received
    assert_equal(after, two)
    assert_equal(before, one)
    before.close()
    assert torch.equal(fetch(name, 2, **at)["layers.3.weight"], two["layers.3.weight"])  # from the one that holds it
    after.close()
    with pytest.raises(NoSource):
        fetch(name, 2, **at)


def test_other_tensors_are_sent_whole(at: At, name: str) -> None:
    one, two = weights(), {**weights(), "another": torch.ones(3)}
    with publish(name, one, 1, **at), publish(name, two, 2, **at):
        before = taken(name, 1, at)
        after = taken(name, 2, at, before)
        assert after.bytes_received == after.total_bytes
        assert_equal(after, two)
        before.close()
        after.close()


def test_the_digest_is_that_of_the_bytes(at: At, name: str) -> None:
    with (
        publish(name, weights(1), 1, **at),
        publish(name, weights(1), 2, **at),
        publish(name, weights(2), 3, **at),
    ):
        settings = settings_of(at["server"], at["settings"])
        one, same, other = (PublishedVersion(name, version, settings).digest for version in "123")
    assert one == same != other


def test_what_changed_in_memory_while_it_was_held_is_sent_anew(at: At, name: str) -> None:
    one = weights()
    with publish(name, one, 1, **at):
        before = taken(name, 1, at)
    next(tensor for key, tensor in before.tensors() if key == "norm").zero_()
    two = {**one, "layers.3.weight": one["layers.3.weight"] + 1}
    with publish(name, two, 2, **at):
        after = taken(name, 2, at, before)
    assert_equal(after, two)
    assert after.bytes_received < after.total_bytes / 4
    before.close()
    after.close()


def test_a_uri_names_it(at: At) -> None:
    settings = settings_of(at["server"], at["settings"])
    with publish("team/my policy", {"weight": torch.ones(3)}, "step 7/8", **at) as published:
        assert published.uri == "mx://team/my%20policy/step%207%2F8"
        named = PublishedVersion.named(published.uri, settings)
        assert named is not None
        assert (named.name, named.version) == ("team/my policy", "step 7/8")
        assert named.digest.startswith("published-")
    assert PublishedVersion.named("s3://bucket/model", settings) is None
    with pytest.raises(SettingError, match="mx://NAME/VERSION"):
        PublishedVersion.named("mx://policy", settings)
