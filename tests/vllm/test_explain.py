"""`mx explain` with vLLM installed: who has just the weights of a worker with these arguments, and who nearly has."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mxcore.cli.explain.engine_identities import engine_identities
from mxcore.cli.main import mx
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import p2p_pb2

NAME = "worker-that-serves"


@pytest.fixture(scope="module")
def raw_identity(model_paths: dict[str, Path]) -> p2p_pb2.SourceIdentity:
    raw, processed = engine_identities(str(model_paths["llama"]), ["--revision", "explained"])
    assert (raw.extra_parameters["layout"], processed.extra_parameters["layout"]) == ("raw", "processed")
    return raw


@pytest.fixture
def served(server: str, raw_identity: p2p_pb2.SourceIdentity) -> Iterator[str]:
    """The model's path; a worker with vLLM's defaults serves its raw weights, as far as the server knows."""
    beaten = threading.Event()
    with ServerClient(server) as client:
        record = p2p_pb2.WorkerMetadata(worker_rank=0, status=p2p_pb2.SOURCE_STATUS_READY)
        published = client.publish(raw_identity, record, NAME)

        def beat() -> None:
            while not beaten.wait(10.0):
                client.update_status(
                    published.mx_source_id, NAME, 0, p2p_pb2.SOURCE_STATUS_READY, epoch=published.epoch
                )

        beating = threading.Thread(target=beat)
        beating.start()
        yield raw_identity.model_name
        beaten.set()
        beating.join()
        client.update_status(published.mx_source_id, NAME, 0, p2p_pb2.SOURCE_STATUS_STALE, epoch=published.epoch)


def explained(server: str, model: str, *arguments: str) -> tuple[str, str]:
    asked = ["explain", model, "--server", server, "--json", "--", "--revision", "explained", *arguments]
    ran = CliRunner().invoke(mx, asked)
    assert ran.exit_code == 0, ran.output
    [p2p] = [path for path in json.loads(ran.stdout)["paths"] if path["rung"] == "p2p"]
    return p2p["verdict"], p2p["reason"]


def test_the_same_arguments(server: str, served: str) -> None:
    verdict, reason = explained(server, served)
    assert verdict == "take"
    assert "1 workers of rank 0 have just these weights (raw)" in reason


def test_without_weight_files_those_of_the_others_are_taken(
    server: str, model_paths: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_paths["llama"], model)
    raw, _ = engine_identities(str(model), ["--revision", "explained"])
    for file in model.glob("*.safetensors*"):
        file.unlink()
    with ServerClient(server) as client:
        record = p2p_pb2.WorkerMetadata(worker_rank=0, status=p2p_pb2.SOURCE_STATUS_READY)
        client.publish(raw, record, "worker-with-files")
        verdict, reason = explained(server, str(model))
        assert verdict == "take"
        assert "1 workers of rank 0 have such weights (raw)" in reason


def test_what_differs_is_named(server: str, served: str) -> None:
    verdict, reason = explained(server, served, "--dtype", "float32")
    assert verdict == "skip"
    assert f"worker {NAME} has" in reason
    assert "dtype" in reason
    assert "bfloat16" in reason


def test_arguments_that_the_engine_refuses_are_said(server: str, served: str) -> None:
    verdict, reason = explained(server, served, "--no-such-argument")
    assert verdict == "take"
    assert "--no-such-argument" in reason
