"""How many bytes of weights are digested: none that nobody needs, none twice."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is the engine's")

from torch import nn  # noqa: E402

from mxcore.digest import xxh3_64  # noqa: E402
from mxcore.engine.weights import Built, MarkUninitialised, Weights  # noqa: E402
from mxcore.errors import LayoutUnsupported  # noqa: E402
from mxcore.transfer.layout import HostDigester  # noqa: E402
from mxcore.transfer.serve import Holder  # noqa: E402
from tests.engine.in_memory import received_from  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of all that is digested from now on."""
    lengths: list[int] = []
    many = HostDigester.many

    def counted_many(self: Any, kind: str, addresses: Any, of: Any, starts: Any, *, threads: int = 1) -> bytes:
        lengths.extend(of)
        return many(self, kind, addresses, of, starts, threads=threads)

    def counted(data: Any) -> int:
        lengths.append(len(data))
        return xxh3_64(data)

    monkeypatch.setattr(HostDigester, "many", counted_many)
    monkeypatch.setattr("mxcore.engine.weights.evidence.xxh3_64", counted)
    return lengths


class Large(nn.Module):
    """One weight, and nothing that a constructor values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1024, 1024), requires_grad=False)


@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_a_target_that_offers_nothing_makes_no_digest_after_it_received(kind: Any, digested: list[int]) -> None:
    with MarkUninitialised():
        source, target = Large(), Large()
    offered, taken = Weights(kind, CPU), Weights(kind, CPU)
    built = Built(source, CPU)
    source.weight.data.fill_(1)
    offered.loaded(source, built)
    offered.processed(source)
    built = Built(target, CPU, copies=True)
    digested.clear()
    taken.loaded(target, built, received_from(offered) if kind == "raw" else None)
    if kind == "processed":
        taken.processed(target, received_from(offered))
    assert digested == []
    assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize(("kind", "times"), [("raw", 2), ("processed", 1)])
def test_a_source_makes_each_digest_once(kind: Any, times: int, digested: list[int]) -> None:
    """Of raw weights once more: that processing wrote nothing over them can only be seen by looking again."""
    with MarkUninitialised():
        source = Large()
    offered, built = Weights(kind, CPU), Built(source, CPU)
    source.weight.data.fill_(1)
    offered.loaded(source, built)
    offered.processed(source)
    assert offered.layout is not None
    assert offered.placement is not None
    Holder(offered.layout, offered.placement, no_session, digests=offered.digests)
    assert sum(digested) == times * offered.layout.total_bytes


def no_session() -> Any:
    raise AssertionError("nobody reads")


def test_raw_weights_that_processing_wrote_over_are_refused_by_name() -> None:
    with MarkUninitialised():
        source = Large()
    offered, built = Weights("raw", CPU), Built(source, CPU)
    source.weight.data.fill_(1)
    offered.loaded(source, built)
    before = source.weight._version
    source.weight.data[3, 5] = 2
    assert source.weight._version == before, "torch counts writes, and not this kind, which is what kernels do"
    with pytest.raises(LayoutUnsupported, match="wrote over some of them: weight"):
        offered.processed(source)
