"""An engine that is not vLLM: what `mxcore.engine` asks of one is enough. Real processes, sockets, server and files."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is the engine's")

from mxcore.engine import Engine, leave, load  # noqa: E402
from mxcore.engine.weights import Weights  # noqa: E402
from mxcore.errors import FenceFailed, LoadPathsExhausted, NoSource  # noqa: E402
from mxcore.storage.remote import LocalFolder, listing_commit, place_of_state  # noqa: E402
from mxcore.transfer.receive.receiver import Receiver, never_freed  # noqa: E402
from mxserver.wire.calls import ServerClient  # noqa: E402
from mxserver.wire.proto import load_pb2, mx_pb2, p2p_pb2  # noqa: E402
from tests.engine.plain_engine import LAYERS, SIZE, Layer, PlainEngine, answer, write_checkpoint  # noqa: E402
from tests.engine.plain_worker import ROLES  # noqa: E402

ROOT = Path(__file__).parents[2]
BYTES = LAYERS * SIZE * SIZE * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def expected(folder: Path) -> str:
    """What the model answers when nothing of ours takes part in it but the reader."""
    return answer(load(PlainEngine(folder, {}), ROLES["both"]))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MODEL_EXPRESS_URL", "MX_SERVER_ADDRESS", "MX_MODEL_URI", "MX_LOAD_PATHS"):
        monkeypatch.delenv(name, raising=False)
    yield
    leave("the test ends")


def options(server: str, **more: Any) -> dict[str, Any]:
    return {"server_address": server, "worker_host": "127.0.0.1", "worker_grpc_port": 0, **more}


@contextlib.contextmanager
def started(folder: Path, role: str, given: dict[str, Any], *, processed: bool) -> Iterator[dict[str, Any]]:
    """A worker in a process of its own, which serves within the block; its answer and report."""
    report = folder.parent / f"{role}-{os.urandom(4).hex()}.json"
    command = {
        "folder": str(folder),
        "role": role,
        "options": given,
        "processed": processed,
        "report": str(report),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.engine.plain_worker", json.dumps(command)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, f"the worker ended with {process.wait()}"
            yield json.loads(line)
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_the_engine_has_all_that_the_protocol_asks_for(folder: Path) -> None:
    engine = PlainEngine(folder, {})
    for name, member in vars(Engine).items():
        if name.startswith("_"):
            continue
        assert hasattr(engine, name), name
        if inspect.isfunction(member):
            assert inspect.signature(getattr(PlainEngine, name)) == inspect.signature(member), name


def origin_of(engine: PlainEngine, report: dict[str, Any]) -> tuple[str, list[str]]:
    """Who vouches for what it offers, as its record says."""
    with ServerClient(engine.options["server_address"]) as client:
        record = client.get_metadata(report["source_id"], report["worker_id"])
    if record is None:
        return "", []
    name = mx_pb2.DigestOrigin.Name(record.worker.digest_origin)
    return name.removeprefix("DIGEST_ORIGIN_"), list(record.worker.received_from)


def received(engine: PlainEngine, role: str, expected: str) -> dict[str, Any]:
    """The report of a load in this process, which then serves nothing."""
    assert answer(load(engine, ROLES[role])) == expected
    report: dict[str, Any] = json.loads(Path(engine.options["report_path"]).read_text())
    report["origin"] = origin_of(engine, report)
    leave("the next one is to find the first source")
    assert report["path"] == "p2p"
    assert report["bytes"] == BYTES  # the table is the constructor's
    assert report["fallbacks"] == []
    return report


def test_processed_weights_go_from_process_to_process(server: str, folder: Path, expected: str) -> None:
    given = options(server, load_paths=["p2p"], report_path=str(folder.parent / "report.json"))
    with started(folder, "both", options(server), processed=True) as source:
        assert source["answer"] == expected
        assert (source["report"]["path"], source["report"]["serving"]) == ("storage", True)
        assert source["events"] == ["build", "fill", "process"]
        engine = PlainEngine(folder, given, processed_weights_move=True)
        report = received(engine, "both", expected)
    assert (report["layout"], report["serving"]) == ("processed", True)
    assert report["source_worker"] == source["report"]["worker_id"]
    assert report["origin"] == ("RECEIVED", [report["source_worker"]])
    assert engine.events == ["build", "placeholder", "process"]


def test_raw_weights_go_to_whoever_processes_them(server: str, folder: Path, expected: str) -> None:
    """To one that exchanges raw ones, to one that only pulls, and to one that would rather have processed ones."""
    given = options(server, load_paths=["p2p"], report_path=str(folder.parent / "report.json"))
    with started(folder, "source", options(server), processed=True) as source:
        assert source["report"]["offers"][0]["layout"] == "raw"
        for role, processed in (("both", False), ("target", False), ("both", True)):
            engine = PlainEngine(folder, given, processed_weights_move=processed)
            report = received(engine, role, expected)
            assert report["source_worker"] == source["report"]["worker_id"]
            if role == "both":
                origin = "RECEIVED_RAW" if processed else "RECEIVED"  # and not PROCESSED: it read nothing itself
                assert report["origin"] == (origin, [report["source_worker"]])
            assert [offer["layout"] for offer in report["offers"]] == (
                [] if role == "target" else ["processed" if processed else "raw"]
            )
            assert engine.events == ["build", "process"]


def test_a_transfer_that_fails_leaves_nothing_behind(
    server: str, folder: Path, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The source's model is of another size: refused; then a model is built anew, and the files fill it."""
    engine = PlainEngine(folder, options(server))
    other = PlainEngine(folder, options(server), size=SIZE // 2)
    other.fill = lambda model, *_: len([weight.fill_(1) for weight in model.parameters()])  # type: ignore[method-assign]
    load(other, ROLES["both"])
    with caplog.at_level("INFO"):
        assert answer(load(engine, ROLES["both"])) == expected
    assert engine.events == ["build", "restore", "build", "fill", "process"]
    assert "load path p2p failed" in caplog.text
    assert engine.watched, "it offers what it has loaded"


def test_the_server_hears_how_long_each_part_took_and_which_engine_it_was(
    server: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[p2p_pb2.WorkerMetadata, load_pb2.LoadReport]] = []
    publish = ServerClient.publish

    def noted(client: ServerClient, identity: Any, worker: Any, *rest: Any, **more: Any) -> Any:
        if more.get("load_report") is not None:
            told.append((worker, more["load_report"]))
        return publish(client, identity, worker, *rest, **more)

    monkeypatch.setattr(ServerClient, "publish", noted)
    report = folder.parent / "report.json"
    load(PlainEngine(folder, options(server, report_path=str(report))), ROLES["both"])
    steps = json.loads(report.read_text())["steps"]
    [(worker, said)] = told
    assert said.transfer_seconds == pytest.approx(steps["fill"])
    assert said.process_seconds == pytest.approx(steps["build"] + steps["process"] + steps["keep"])
    assert said.wait_seconds > 0
    assert worker.replica == f"plain-{socket.gethostname()}-{os.getpid()}"
    assert worker.node_name == socket.gethostname()


def refused(server: str, model: Path) -> list[tuple[str, str, int]]:
    """What the server has counted of weights of this model that are not shared."""
    with ServerClient(server) as client:
        return [
            (
                load_pb2.RefusalSide.Name(count.side).removeprefix("REFUSAL_SIDE_").lower(),
                load_pb2.RefusalReason.Name(count.reason).removeprefix("REFUSAL_REASON_"),
                count.count,
            )
            for count in client.refusals()
            if count.model_name == str(model)
        ]


def test_weights_that_are_not_taken_are_counted_by_reason(server: str, folder: Path, expected: str) -> None:
    """The source is READY and so is who could not take its weights: only the count tells that nothing is shared."""
    report = folder.parent / "report.json"
    other = PlainEngine(folder, options(server), size=SIZE // 2)
    other.fill = lambda model, *_: len([weight.fill_(1) for weight in model.parameters()])  # type: ignore[method-assign]
    load(other, ROLES["both"])
    engine = PlainEngine(folder, options(server, report_path=str(report)))
    assert answer(load(engine, ROLES["both"])) == expected
    told = json.loads(report.read_text())
    assert (told["path"], told["serving"]) == ("storage", True)
    assert told["refusals"] == {"receive": {"layout_mismatch": 1}}
    assert refused(server, folder) == [("receive", "LAYOUT_MISMATCH", 1)]


def test_a_mode_in_which_memory_moves_is_counted(server: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlainEngine, "loses_memory", lambda self: "the mode of this test")
    load(PlainEngine(folder, options(server)), ROLES["both"])
    assert refused(server, folder) == [("offer", "MEMORY_MOVES", 1)]


@pytest.mark.parametrize("uri", [False, True])
def test_storage_alone(folder: Path, expected: str, uri: bool, tmp_path: Path) -> None:
    """Without a server; from the model's own folder and from MX_MODEL_URI."""
    given: dict[str, Any] = {"report_path": str(tmp_path / "report.json")}
    model = tmp_path / "a name without files" if uri else folder
    if uri:
        given["model_uri"] = f"file://{folder}"
    assert answer(load(PlainEngine(model, given), ROLES["both"])) == expected
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["path"] == ("uri" if uri else "storage")
    assert report["fallbacks"] == ["joining: no server is set"]
    assert [step["rung"] for step in report["paths"]][:2] == ["p2p", "fleet"]
    assert not report["serving"]


def test_what_leaves_a_load(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    with pytest.raises(FileNotFoundError, match="no weights"):
        load(PlainEngine(nothing, {}), ROLES["both"])
    with pytest.raises(LoadPathsExhausted, match="no server is set"):
        load(PlainEngine(nothing, {"load_paths": ["p2p"]}), ROLES["both"])
    with pytest.raises(NoSource, match=r"target has no raw weights of .*: no server is set\. Start a source\."):
        load(PlainEngine(nothing, {}), ROLES["target"])


def test_weights_that_are_packed_away_are_refused_by_name(
    server: str, folder: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where processing keeps them in something that cannot be read back, nothing is offered."""

    def pack(layer: Layer) -> None:
        layer._gain_float = 1.0 + float(layer.weight.abs().mean())
        packed = layer.weight.t().contiguous()
        layer.multiply = lambda x: x @ packed
        layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    monkeypatch.setattr(Layer, "process", pack)
    monkeypatch.setattr(
        Layer, "forward", lambda layer, x: torch.tanh(layer.multiply(x) * layer._gain_float * layer.table)
    )
    given = options(server, report_path=str(folder.parent / "report.json"))
    assert answer(load(PlainEngine(folder, given, processed_weights_move=True), ROLES["both"])) == expected
    report = json.loads((folder.parent / "report.json").read_text())
    assert (report["path"], report["serving"]) == ("storage", False)
    (fallback,) = report["fallbacks"]
    assert "0.weight" in fallback
    assert "MX_LAYOUT_UNSUPPORTED" in fallback
    assert report["refusals"] == {"offer": {"layout_unsupported": 1}}
    assert refused(server, folder) == [("offer", "LAYOUT_UNSUPPORTED", 1)]


@pytest.mark.parametrize("processed", [False, True])
def test_memory_that_may_still_be_written_to_is_never_used_nor_freed(
    server: str, folder: Path, expected: str, monkeypatch: pytest.MonkeyPatch, processed: bool
) -> None:
    report = folder.parent / "report.json"
    given: list[Any] = []

    def fails(receiver: Receiver, *arguments: Any) -> None:
        given.extend(receiver._received.placement.addresses)
        raise FenceFailed("as if an agent had not been destroyed")

    with started(folder, "both", options(server), processed=processed):
        monkeypatch.setattr(Receiver, "_receive", fails)
        engine = PlainEngine(
            folder,
            options(server, report_path=str(report), load_paths=["p2p", "engine"]),
            processed_weights_move=processed,
        )
        before = len(never_freed)
        model = load(engine, ROLES["both"])
    assert answer(model) == expected
    assert json.loads(report.read_text())["path"] == "storage"
    kept = never_freed[before]
    assert isinstance(kept, Weights)
    held = {tensor.untyped_storage().data_ptr() for tensor in kept.found.kept.values()}
    assert set(given) <= held | {tensor.data_ptr() for tensor in kept.found.kept.values()}
    assert not {parameter.data_ptr() for parameter in model.parameters()} & set(given)


class Damaged(PlainEngine):
    """An engine whose memory loses a bit between reading and processing, or whose loader computes there."""

    damages: Any = staticmethod(lambda weight: None)

    def fill(self, model: Any, source: Any, settings: Any, progress: Any) -> int:
        read = super().fill(model, source, settings, progress)
        self.damages(next(model.parameters()).detach())
        return read


def test_a_bit_lost_after_reading_is_written_again_and_nothing_is_offered(
    server: str, folder: Path, expected: str
) -> None:
    report = folder.parent / "report.json"
    engine = Damaged(folder, options(server, report_path=str(report)))
    engine.damages = lambda weight: weight.view(torch.int32)[3, 3:4].bitwise_xor_(1 << 22)
    assert answer(load(engine, ROLES["both"])) == expected  # the engine does not answer with it
    told = json.loads(report.read_text())
    assert (told["path"], told["serving"]) == ("storage", False)
    assert "1 bits in memory were not what was read" in told["fallbacks"][0]


def test_a_loader_that_computes_is_offered(server: str, folder: Path) -> None:
    report = folder.parent / "report.json"
    engine = Damaged(folder, options(server, report_path=str(report)))
    engine.damages = lambda weight: weight.neg_()
    load(engine, ROLES["both"])
    assert json.loads(report.read_text())["serving"]


class Replaced(PlainEngine):
    """An engine under whose path another checkpoint comes, after joining or while the files are read."""

    when = ""
    place = ""

    def identity(self, kind: Any, revision: str, checkpoint: str | None) -> Any:
        made = super().identity(kind, revision, checkpoint)
        self._replace("joined")
        return made

    def fill(self, model: Any, source: Any, settings: Any, progress: Any) -> int:
        read = super().fill(model, source, settings, progress)
        self._replace("reading")
        return read

    def _replace(self, now: str) -> None:
        if self.when == now:
            self.when = ""
            write_checkpoint(Path(self.place or self.model), seed=7)


@pytest.mark.parametrize(("when", "path"), [("joined", "p2p"), ("reading", "storage")])
def test_a_checkpoint_replaced_meanwhile_is_offered_as_what_was_read_or_not_at_all(
    server: str, folder: Path, tmp_path: Path, when: str, path: str
) -> None:
    """Finding W3: what was read under v1's name and is v2 must not be taken for v1, by a rollback for instance."""
    report = tmp_path / "report.json"
    old = answer(load(PlainEngine(folder, {}), ROLES["both"]))
    first = Replaced(folder, options(server, report_path=str(report)))
    first.when = when
    given = answer(load(first, ROLES["both"]))
    assert (given == old) == (when == "reading")
    assert json.loads(report.read_text())["serving"] == (when == "joined")
    assert refused(server, folder) == [("offer", "FILE_CHANGED", 1)] * (when == "reading")
    new = answer(load(PlainEngine(folder, options(server, report_path=str(report))), ROLES["both"]))
    assert new != old
    assert json.loads(report.read_text())["path"] == path
    write_checkpoint(folder)
    assert answer(load(PlainEngine(folder, options(server, report_path=str(report))), ROLES["both"])) == old


@pytest.mark.parametrize(("when", "path"), [("joined", "p2p"), ("reading", "uri")])
def test_a_checkpoint_replaced_below_a_local_uri_is_offered_as_what_was_read_or_not_at_all(
    server: str, folder: Path, tmp_path: Path, when: str, path: str
) -> None:
    """As the engine's own files: the rung `uri` looks at them before and after reading."""
    report = tmp_path / "report.json"
    given = options(server, report_path=str(report), model_uri=f"file://{folder}")
    old = answer(load(PlainEngine(folder, {}), ROLES["both"]))
    first = Replaced(tmp_path / "a name", given)
    first.when, first.place = when, str(folder)
    assert (answer(load(first, ROLES["both"])) == old) == (when == "reading")
    told = json.loads(report.read_text())
    assert (told["path"], told["serving"]) == ("uri", when == "joined")
    assert any("changed while they were read" in line for line in told["fallbacks"]) == (when == "reading")
    assert answer(load(PlainEngine(tmp_path / "a name", given), ROLES["both"])) != old
    assert json.loads(report.read_text())["path"] == path
    write_checkpoint(folder)
    assert answer(load(PlainEngine(tmp_path / "a name", given), ROLES["both"])) == old


def test_files_that_vanish_after_they_were_read_are_not_offered(server: str, folder: Path, tmp_path: Path) -> None:
    """The model is there all the same; but nobody can say any more of which files."""

    class Vanishing(PlainEngine):
        def fill(self, model: Any, source: Any, settings: Any, progress: Any) -> int:
            read = super().fill(model, source, settings, progress)
            for file in folder.iterdir():
                file.unlink()
            return read

    report = tmp_path / "report.json"
    given = options(server, report_path=str(report), model_uri=f"file://{folder}")
    load(Vanishing(tmp_path / "a name", given), ROLES["both"])
    told = json.loads(report.read_text())
    assert (told["path"], told["serving"]) == ("uri", False)
    assert "no complete checkpoint there" in told["fallbacks"][0]


def test_weights_of_another_state_than_the_configuration_are_refused(folder: Path, tmp_path: Path) -> None:
    """The configuration was read of MX_MODEL_URI, which was changed before the weights are."""
    listed = LocalFolder(folder).files
    state = place_of_state(tmp_path / "hub", "uri", listing_commit(listed), lambda to: (to / "config.json").touch())
    given = {"model_uri": f"file://{folder}", "load_paths": "uri"}
    load(PlainEngine(state, given), ROLES["both"])
    (folder / "config.json").write_text("{}")
    with pytest.raises(LoadPathsExhausted, match="has changed since the configuration was read"):
        load(PlainEngine(state, given), ROLES["both"])
