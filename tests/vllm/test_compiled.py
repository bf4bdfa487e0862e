"""Eager workers and workers whose model torch's compiler has compiled share weights; elsewhere the compiler is off.

Compiling takes most of a minute, so all of it is in one process, whose compiler's cache is the session's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from tests.vllm.engines import EngineHost

LEVELS: dict[str, dict[str, Any]] = {
    "none": {"mode": 0},
    "traced": {"mode": 2, "backend": "eager"},
    "inductor": {"mode": 3},  # of which vLLM makes mode 2 on a CPU
}


@pytest.fixture(scope="module")
def compiling(folder: Path, server: str) -> Iterator[EngineHost]:
    """A process in which torch's compiler is on."""
    environ = {"TORCHDYNAMO_DISABLE": "0", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    host = EngineHost("compiling", folder, server, environ)
    host.ask("plain_linear", on=True)
    yield host
    host.close()


@pytest.mark.parametrize(("level", "kind"), [("none", "raw"), ("traced", "processed"), ("inductor", "raw")])
def test_compiled_workers_share_weights_with_eager_ones(
    level: str,
    kind: str,
    compiling: EngineHost,
    target: EngineHost,
    unpacked: None,
    model_paths: dict[str, Path],
) -> None:
    """Eager to compiled, and from that worker to an eager one."""
    model, extra = model_paths["llama"], {"layout": kind}
    options: dict[str, Any] = {"enforce_eager": False, "compilation_config": LEVELS[level]}
    expected = compiling.load(model, "auto", **options).answers
    eager = target.load(model, "auto").answers
    before = compiling.ask("compiled")["graphs"]
    first = target.load(model, extra=extra)
    with files_away(weight_files(model)):
        second = compiling.load(model, extra=extra, **options)
        graphs = compiling.ask("compiled")["graphs"] - before
        target.ask("leave")
        third = target.load(model, extra=extra)
    compiling.ask("leave")

    assert first.answers == third.answers == eager
    assert second.answers == expected
    assert (second.report["path"], third.report["path"]) == ("p2p", "p2p")
    assert third.report["source_worker"] == second.report["worker_id"]
    assert (graphs > 0) == (level != "none")
