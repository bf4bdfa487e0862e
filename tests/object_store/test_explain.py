"""`mx explain`: the ladder for an environment, with a real mxserver, a real S3 server, and neither."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mxbench.stand_ins.s3_server import KEY_ID, SECRET, S3Server, environment
from mxserver.wire.calls import ServerClient, source_id
from mxserver.wire.proto import p2p_pb2
from tests.cli.mx_process import ROOT, Ran, mx
from tests.object_store.conftest import PREFIX, URI
from tests.server.conftest import ServerProcess

Made = tuple[Path, dict[str, np.ndarray]]


def verdicts(ran: Ran) -> dict[str, Any]:
    return {path["rung"]: (path["verdict"], path["reason"]) for path in ran.json()["paths"]}


@pytest.fixture
def mxserver(tmp_path: Path) -> Iterator[ServerProcess]:
    environ = {"MX_METADATA_BACKEND": "memory", "MODEL_EXPRESS_CACHE_DIRECTORY": str(tmp_path / "cache")}
    environ |= {"MX_FILE_SOURCES": str(tmp_path)}
    server = ServerProcess("--port", "0", environ=environ)
    yield server
    server.close()


def test_alone() -> None:
    ran = mx("explain", "org/name", "--json")
    found = verdicts(ran)
    assert list(found) == ["p2p", "fleet", "uri", "cache", "engine"]
    assert [found[rung][0] for rung in found] == ["skip", "skip", "skip", "skip", "take"]
    assert "MODEL_EXPRESS_URL" in found["p2p"][1]
    assert ran.code == 0


def test_chosen_paths_in_their_order_as_a_table() -> None:
    ran = mx("explain", "/nowhere/model", MX_LOAD_PATHS="engine,p2p")
    assert ran.code == 1, "none can be taken"
    lines = ran.out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["1", "engine", "skip"], ["2", "p2p", "skip"]]
    assert "there is no folder /nowhere/model" in lines[1]


def test_a_wrong_choice_warns_and_the_default_is_shown() -> None:
    ran = mx("explain", "--json", MX_LOAD_PATHS="p2p,engin")
    assert "the nearest one is 'engine'" in ran.err
    assert len(verdicts(ran)) == 5


def test_with_a_store_and_no_secret_in_the_answer(server: S3Server, made: Made) -> None:
    ran = mx("explain", "org/name", "--json", MX_MODEL_URI=URI, **environment(server.address))
    verdict, reason = verdicts(ran)["uri"]
    assert verdict == "take"
    assert f"8 tensors in 2 files, {sum(t.nbytes for t in made[1].values())} bytes" in reason
    wrong = environment(server.address) | {"AWS_SECRET_ACCESS_KEY": "another-secret-than-that"}
    denied = mx("explain", "--json", MX_MODEL_URI=URI, **wrong)
    assert verdicts(denied)["uri"][0] == "skip"
    assert "MX_OBJECT_DENIED" in verdicts(denied)["uri"][1]
    for text in (ran.out, ran.err, denied.out, denied.err):
        assert not any(secret in text for secret in (SECRET, KEY_ID, "another-secret-than-that"))


def test_with_a_folder(made: Made) -> None:
    ran = mx("explain", "--json", MX_MODEL_URI=str(made[0] / "models" / PREFIX))
    assert verdicts(ran)["uri"][0] == "take"
    gone = mx("explain", "--json", MX_MODEL_URI="/nowhere/at/all")
    assert "no such folder" in verdicts(gone)["uri"][1]


def test_with_a_server(mxserver: ServerProcess, made: Made) -> None:
    environ = {"MODEL_EXPRESS_URL": mxserver.address}
    found = verdicts(mx("explain", "org/name", "--json", **environ))
    assert found["p2p"] == ("skip", f"the server at {mxserver.address} knows no workers with org/name that are READY")
    assert found["fleet"][0] == "wait"
    assert found["cache"] == ("skip", "the server's cache does not have the weights of org/name")

    identity = p2p_pb2.SourceIdentity(mx_version="mx-1", model_name="org/name")
    with ServerClient(mxserver.address) as client:
        for number, status in enumerate((p2p_pb2.SOURCE_STATUS_READY, p2p_pb2.SOURCE_STATUS_INITIALIZING)):
            answer = client.publish(identity, p2p_pb2.WorkerMetadata(worker_rank=0, status=status), f"w{number}")
            client.update_status(source_id(identity), f"w{number}", 0, status, epoch=answer.epoch)
    found = verdicts(mx("explain", "--json", **environ))  # with a name vLLM would be asked: tests/vllm/test_explain.py
    assert found["p2p"] == ("take", "1 workers are READY (ranks 0), if their layout is this worker's")
    assert "1 workers load now" in found["fleet"][1]
    found = verdicts(mx("explain", "org/other", "--json", MODEL_EXPRESS_NO_SHARED_STORAGE="1", **environ))
    assert found["p2p"][0] == "skip"
    assert "the server downloads org/other and streams it" in found["cache"][1]


def test_a_folder_is_no_name_of_the_hub(mxserver: ServerProcess, tmp_path: Path) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for written in (str(folder), f"{folder}/", os.path.relpath(folder, ROOT)):
        found = verdicts(mx("explain", written, "--json", MODEL_EXPRESS_URL=mxserver.address))
        assert found["cache"] == (
            "skip",
            f"{folder} is a folder of this machine, and no model that the server could have",
        )
        assert f"no workers with {folder} that" in found["p2p"][1]


def test_with_a_server_that_does_not_answer() -> None:
    ran = mx("explain", "m", "--json", "--server", "127.0.0.1:1", MX_SERVER_TIMEOUT_SECS="2")
    for rung in ("p2p", "fleet", "cache"):
        assert "MX_SERVER_UNREACHABLE" in verdicts(ran)[rung][1]
    assert os.environ.get("MODEL_EXPRESS_URL") is None
