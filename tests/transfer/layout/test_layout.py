"""Layouts: extents, fingerprints, differences, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcore.cuda import Context
from mxcore.errors import CudaMissing, LayoutMismatch, LayoutUnsupported
from mxcore.transfer.layout import Layout, LocalTensor, build_layout
from mxcore.transfer.route import device_proof, require_movable
from mxserver.wire.proto import mx_pb2
from tests.transfer.memory import HostTensors, Spec, model_specs


def tensor(name: str, address: int, shape: tuple[int, ...] = (8,), **changes: object) -> LocalTensor:
    stride = tuple(int(s) for s in reversed([1, *_products(shape)][: len(shape)])) if shape else ()
    base = LocalTensor(name, "torch.int8", shape, stride, address, 1, 0x1000, 0x10000, "cpu", 0)
    return replace(base, **changes)


def _products(shape: tuple[int, ...]) -> list[int]:
    products = []
    product = 1
    for length in reversed(shape):
        product *= length
        products.append(product)
    return products


def test_tied_tensors_share_an_extent_and_travel_once() -> None:
    layout, placement = build_layout("raw", [tensor("head", 0x1000), tensor("embed", 0x1000), tensor("w", 0x1100)])
    assert [t.name for t in layout.tensors] == ["embed", "head", "w"]
    assert [t.extent for t in layout.tensors] == [0, 0, 1]
    assert layout.extent_bytes == (8, 8)
    assert layout.total_bytes == 16
    assert placement.addresses == (0x1000, 0x1100)


def test_overlapping_views_merge_and_neighbours_do_not() -> None:
    layout, placement = build_layout(
        "raw", [tensor("c", 0x1008), tensor("a", 0x1000, (6,)), tensor("b", 0x1004, (4,)), tensor("d", 0x1010)]
    )
    by_name = {t.name: (t.extent, t.offset_bytes) for t in layout.tensors}
    assert by_name == {"a": (0, 0), "b": (0, 4), "c": (1, 0), "d": (2, 0)}
    assert layout.extent_bytes == (8, 8, 8)
    assert placement.addresses == (0x1000, 0x1008, 0x1010)


def test_a_strided_tensor_spans_its_elements() -> None:
    strided = tensor("s", 0x1000, (3, 2), stride=(10, 1), itemsize_bytes=2)
    layout, _ = build_layout("raw", [strided])
    assert layout.extent_bytes == ((2 * 10 + 1 + 1) * 2,)
    expanded, _ = build_layout("raw", [tensor("e", 0x1000, (1000, 4), stride=(0, 1))])
    assert expanded.extent_bytes == (4,)


def test_a_tensor_without_elements_lies_nowhere() -> None:
    empty = tensor("nothing", 0, (0, 5), stride=(5, 1), storage_address=0, storage_bytes=0)
    layout, placement = build_layout("raw", [empty, tensor("w", 0x1000)])
    assert layout.tensors[0].extent is None
    assert layout.extent_bytes == (8,)
    assert placement.addresses == (0x1000,)
    alone, _ = build_layout("raw", [empty])
    assert alone.total_bytes == 0


def test_the_fingerprint_does_not_depend_on_addresses_or_order() -> None:
    here = HostTensors(model_specs(), 1)
    there = HostTensors(model_specs()[::-1], 2)
    first, second = build_layout("raw", here.local_tensors()), build_layout("raw", there.local_tensors())
    assert first[0].fingerprint == second[0].fingerprint
    assert first[1].addresses != second[1].addresses
    assert first[0].differences(second[0]) == []


def test_the_stride_of_a_dimension_of_length_one_does_not_count() -> None:
    ours, _ = build_layout("raw", [tensor("w", 0x1000, (1, 8), stride=(8, 1))])
    theirs, _ = build_layout("raw", [tensor("w", 0x1000, (1, 8), stride=(1, 1))])
    assert ours == theirs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "torch.uint8"}, "w: dtype torch.int8 here, torch.uint8 there"),
        ({"shape": (2, 4), "stride": (4, 1)}, "w: shape (8,) here, (2, 4) there"),
        ({"stride": (2,)}, "w: stride (1,) here, (2,) there"),
        ({"name": "v"}, "v: only there"),
    ],
)
def test_every_difference_changes_the_fingerprint_and_is_named(change: dict[str, object], said: str) -> None:
    ours, _ = build_layout("raw", [tensor("a", 0x2000), tensor("w", 0x1000)])
    theirs, _ = build_layout("raw", [tensor("a", 0x2000), replace(tensor("w", 0x1000), **change)])
    assert ours.fingerprint != theirs.fingerprint
    assert said in ours.differences(theirs)


def test_memory_shared_differently_is_a_difference() -> None:
    tied, _ = build_layout("raw", [tensor("a", 0x1000), tensor("b", 0x1000)])
    untied, _ = build_layout("raw", [tensor("a", 0x1000), tensor("b", 0x2000)])
    assert tied.fingerprint != untied.fingerprint
    assert tied.differences(untied)[0].startswith("b: memory shared differently")
    assert "extent 0 + 0 here, extent 1 + 0 there" not in tied.differences(untied)[0]


def test_kinds_never_mix() -> None:
    raw, _ = build_layout("raw", [tensor("a", 0x1000)])
    processed, _ = build_layout("processed", [tensor("a", 0x1000)])
    assert raw.differences(processed) == ["kind: raw here, processed there"]
    assert raw.fingerprint != processed.fingerprint


def test_other_extents_under_the_same_tensors_are_a_difference() -> None:
    layout, _ = build_layout("raw", [tensor("a", 0x1000)])
    other = Layout(layout.kind, layout.tensors, (9,))
    assert layout.differences(other) == ["memory between tensors: 8 bytes here, 9 bytes there"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([tensor("w", 0x1000), tensor("w", 0x2000)], "'w' occurs twice"),
        ([tensor("w", 0x1000, stride=(-1,))], "stride (-1,)"),
        ([tensor("w", 0x1000, stride=(1, 1))], "stride (1, 1)"),
        ([tensor("w", 0x0FFF)], "outside of its storage"),
        ([tensor("w", 0x10FFC, storage_bytes=0x10000)], "outside of its storage"),
        ([tensor("a", 0x1000), tensor("w", 0x1000, device_type="cuda")], "'w' is on cuda, others on cpu"),
    ],
)
def test_what_cannot_be_described_is_refused_by_name(tensors: list[LocalTensor], said: str) -> None:
    with pytest.raises(LayoutUnsupported) as raised:
        build_layout("raw", tensors)
    assert said in str(raised.value)


def test_the_first_problems_are_named_and_the_rest_counted() -> None:
    with pytest.raises(LayoutUnsupported, match="and 3 more"):
        build_layout("raw", [tensor(f"w{i}", 0) for i in range(8)])


def test_device_memory_has_a_layout_and_is_not_moved_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(index: int) -> Context:
        raise CudaMissing("no usable CUDA driver (libcuda.so.1: not found)")

    monkeypatch.setattr(device_proof, "context_of", missing)
    device_proof.release_devices()
    _, placement = build_layout("raw", [tensor("w", 0x1000, device_type="cuda", device_index=1)])
    assert placement.device_indices == (1,)
    with pytest.raises(LayoutUnsupported, match=r"device 1: the CUDA driver failed.*Load from storage"):
        require_movable(placement)
    device_proof.release_devices()


def test_the_same_address_on_two_devices_is_two_extents() -> None:
    tensors = [tensor("a", 0x1000, device_type="cuda"), tensor("b", 0x1000, device_type="cuda", device_index=1)]
    layout, placement = build_layout("raw", tensors)
    assert layout.extent_bytes == (8, 8)
    assert placement.device_indices == (0, 1)


def test_it_travels_unchanged() -> None:
    layout, _ = build_layout("processed", HostTensors(model_specs(), 1).local_tensors())
    message = mx_pb2.Layout.FromString(layout.to_proto().SerializeToString())
    assert Layout.from_proto(message) == layout
    assert Layout.from_proto(message).fingerprint == layout.fingerprint


def test_a_layout_that_contradicts_itself_is_refused() -> None:
    missing_extent = mx_pb2.Layout(kind="raw", tensors=[mx_pb2.Tensor(name="a", shape=[1], stride=[1], extent=3)])
    with pytest.raises(LayoutMismatch, match="extent 3 of 0"):
        Layout.from_proto(missing_extent)
    twice = mx_pb2.Layout(kind="raw", tensors=[mx_pb2.Tensor(name="a", shape=[0]), mx_pb2.Tensor(name="a", shape=[0])])
    with pytest.raises(LayoutMismatch, match="not sorted"):
        Layout.from_proto(twice)


views = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60)), min_size=1, max_size=30)


@given(views)
def test_extents_are_the_union_of_the_tensors(spans: list[tuple[int, int]]) -> None:
    tensors = [tensor(f"t{i:02}", 0x1000 + begin, (length,)) for i, (begin, length) in enumerate(spans)]
    layout, placement = build_layout("raw", tensors)
    covered = {0x1000 + begin + i for begin, length in spans for i in range(length)}
    extents = [range(a, a + n) for a, n in zip(placement.addresses, layout.extent_bytes, strict=True)]
    assert sum(map(len, extents)) == len(covered)  # nothing twice
    assert {address for extent in extents for address in extent} == covered
    for local, described in zip(sorted(tensors, key=lambda t: t.name), layout.tensors, strict=True):
        assert described.extent is not None
        assert placement.addresses[described.extent] + described.offset_bytes == local.address
    first_names = [min(t.name for t in layout.tensors if t.extent == i) for i in range(len(extents))]
    assert first_names == sorted(first_names)


@given(views, st.integers(1, 1000))
def test_moving_all_memory_changes_nothing(spans: list[tuple[int, int]], distance: int) -> None:
    here = [tensor(f"t{i}", 0x1000 + begin, (length,)) for i, (begin, length) in enumerate(spans)]
    there = [replace(t, address=t.address + distance, storage_address=t.storage_address + distance) for t in here]
    assert build_layout("raw", here)[0] == build_layout("raw", there)[0]


def test_specs_of_the_tests_cover_what_they_claim() -> None:
    layout, _ = build_layout("raw", HostTensors(model_specs(), None).local_tensors())
    by_name = {t.name: t for t in layout.tensors}
    assert by_name["embed.weight"].extent == by_name["head.weight"].extent
    assert by_name["fused.q"].extent == by_name["fused.k"].extent
    assert by_name["nothing"].extent is None
    assert isinstance(model_specs()[0], Spec)
