"""A process is killed at a step of an update: the engine has the old version or the new one, or it answers nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mxbench.demo.models import weight_files
from mxbench.demo.processes import files_away
from mxbench.demo.workers import Server
from tests.small_disk import SmallDisk
from tests.vllm.engines import EngineHost
from tests.vllm.updated import TRANSFER, Versions, as_loaded, now, update, versions_of

IMPATIENT = {"stall_timeout_seconds": 1, "transfer_timeout_seconds": 5, "server_timeout_seconds": 3}
SEEDS = int(os.environ.get("UPDATE_SEEDS", "6"))
MODULES = 12  # that a step's number is drawn from; the model has more
STEPS = ("a holder is found", "its weights fit", "the first module is written", "the new version is offered")
"""Keys of `tests.vllm.killing.STEPS`."""
PROCESSED: dict[str, Any] = {"layout": "processed", **IMPATIENT}


@pytest.fixture(scope="module")
def versions(folder: Path) -> Versions:
    return versions_of(folder, "llama")


@pytest.fixture
def expected(target: EngineHost, unpacked: None, versions: Versions) -> dict[Path, dict[str, Any]]:
    """What an engine of either version has and answers."""
    return {model: as_loaded(target, model) for model in versions}


@pytest.fixture
def other(folder: Path, server: str) -> Iterator[EngineHost]:
    """A process that is killed."""
    host = EngineHost("killed", folder, server)
    host.ask("plain_linear", on=True)
    yield host
    host.close()


def kill_at(host: EngineHost, step: str, pid: int = 0, number: int = 1) -> None:
    arguments = {"step": step, "pid": pid, "number": number}
    host.ask("call", function="tests.vllm.killing:kill_at", arguments=arguments)


@pytest.mark.parametrize("step", STEPS[:2])
def test_a_holder_is_killed(
    step: str, other: EngineHost, target: EngineHost, versions: Versions, expected: dict[Path, dict[str, Any]]
) -> None:
    """Nobody else has the new version: the old one stays, or is back; storage has it at the next try."""
    held = other.load(versions.two, extra=PROCESSED, keep=True).report
    target.load(versions.one, extra=PROCESSED, keep=True, **TRANSFER)
    try:
        kill_at(target, step, other.process.pid)
        info = {"path": str(versions.two), "checkpoint": held["checkpoint"]}
        with files_away(weight_files(versions.two)):
            told = target.ask("update", info=info)
        assert f"{versions.two} is not loaded, {versions.one} " in told["error"]
        assert told["states"][0]["models"][0]["ready"]
        assert now(target) == expected[versions.one]
        update(target, path=str(versions.two))
        assert now(target) == expected[versions.two]
    finally:
        target.ask("end")


@pytest.mark.parametrize("step", STEPS)
def test_the_server_is_killed(
    step: str,
    tmp_path: Path,
    source: EngineHost,
    target: EngineHost,
    versions: Versions,
    expected: dict[Path, dict[str, Any]],
) -> None:
    """The holder still gives its weights, or storage does."""
    server = Server(tmp_path)
    extra: dict[str, Any] = {**PROCESSED, "server_address": server.start()}
    first = step == "the first module is written"  # which nobody does who takes processed weights
    try:
        if not first:
            source.load(versions.two, extra=extra, keep=True)
        target.load(versions.one, extra=extra, keep=True, **TRANSFER)
        kill_at(target, step, server.child.pid)
        update(target, path=str(versions.two))
        assert now(target) == expected[versions.two]
    finally:
        source.ask("end")
        target.ask("end")
        server.child.stop()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_kill_that_a_seed_draws(
    seed: int,
    tmp_path: Path,
    other: EngineHost,
    target: EngineHost,
    versions: Versions,
    expected: dict[Path, dict[str, Any]],
) -> None:
    """Holder, server or engine, at any step: whole weights of one version afterwards, and the next updates are right.

    UPDATE_SEEDS says how many are drawn.
    """
    draw = random.Random(seed)
    victim, step = draw.choice(("holder", "server", "engine")), draw.choice(STEPS)
    number = draw.randint(1, MODULES) if step == "the first module is written" else 1
    raw = number > 1 or step == "the first module is written"  # those who take processed weights write no module
    server = Server(tmp_path)
    extra: dict[str, Any] = {**(IMPATIENT if raw else PROCESSED), "server_address": server.start()}
    try:
        other.load(versions.two, extra=extra, keep=True)
        target.load(versions.one, extra=extra, keep=True, **TRANSFER)
        pid = {"holder": other.process.pid, "server": server.child.pid, "engine": 0}[victim]
        kill_at(target, step, pid, number)
        if victim == "engine":
            with pytest.raises(AssertionError, match="gave no answer to update"):
                target.ask("update", info={"path": str(versions.two)})
            target.ask("plain_linear", on=True)  # it is another process by now
            target.load(versions.one, extra=extra, keep=True, **TRANSFER)
            assert now(target) == expected[versions.one]
        else:
            told = target.ask("update", info={"path": str(versions.two)})
            model = told["states"][0]["models"][0]
            assert model["ready"], told
            assert model["version"] == str(versions.one if told["error"] else versions.two)
            assert now(target) == expected[Path(model["version"])]
        for version in (versions.two, versions.one):
            update(target, path=str(version))
            assert now(target) == expected[version]
    finally:
        target.renew()
        server.child.stop()


def test_an_engine_is_killed(
    other: EngineHost, target: EngineHost, versions: Versions, expected: dict[Path, dict[str, Any]]
) -> None:
    """It has half of each version, and no longer offers the old one: who wants that reads storage."""
    other.load(versions.one, extra=PROCESSED, keep=True, **TRANSFER)
    kill_at(other, "the first module is written")
    with pytest.raises(AssertionError, match="gave no answer to update"):
        other.ask("update", info={"path": str(versions.two)})
    loaded = target.load(versions.one, extra=PROCESSED)
    assert loaded.answers == expected[versions.one]["answers"]
    assert loaded.report["path"] == "storage"


def test_a_full_disk_keeps_no_version_from_an_engine(
    tmp_path: Path, target: EngineHost, versions: Versions, expected: dict[Path, dict[str, Any]]
) -> None:
    """An update writes nothing to a disk but its report."""
    with SmallDisk(tmp_path / "disk", "64k") as disk:
        loaded = target.load(
            versions.one, extra={**PROCESSED, "report_path": str(disk.folder / "report.json")}, keep=True, **TRANSFER
        )
        disk.fill(0)
        try:
            update(target, path=str(versions.two))
            assert now(target) == expected[versions.two]
        finally:
            target.ask("end")
        assert not (disk.folder / "report.json.update").exists()
    assert loaded.answers == expected[versions.one]["answers"]


@pytest.mark.parametrize("seed", [0, 2])  # of either rank
def test_a_rank_that_a_seed_draws_is_killed(seed: int, folder: Path, server: str, versions: Versions) -> None:
    """vLLM ends an engine that has lost a process: it answers nothing any more. A new one has the old version."""
    draw = random.Random(seed)
    rank, number = draw.randrange(2), draw.randint(1, MODULES)
    host = EngineHost("killed-rank", folder, server)
    options = {"tensor_parallel_size": 2, "worker_extension_cls": "tests.vllm.killing.KillingExtension"}
    try:
        host.ask("fork_workers")
        host.load(versions.one, keep=True, **options, **TRANSFER)
        before = now(host)
        host.ask("rpc", method="kill_rank", args=[rank, "the first module is written", number])
        with pytest.raises(AssertionError, match="update: "):
            host.ask("update", info={"path": str(versions.two)})
        with pytest.raises(AssertionError, match="answers: "):
            host.ask("answers")
        host.renew()
        host.ask("fork_workers")
        host.load(versions.one, keep=True, **options, **TRANSFER)
        assert now(host) == before
    finally:
        host.renew()
        host.close()
