"""What scripts build on: `mx models --json`, its exit codes, and messages for people on stderr alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mxbench.stand_ins.hub import HubStandIn
from tests.models.conftest import FILE_DIGESTS, FILES, REPOSITORY, WEIGHTS, StartServer, files_below
from tests.models.models_command import data, mx

TOTAL = sum(map(len, FILES.values()))


@pytest.fixture
def server(start_server: StartServer) -> str:
    return start_server(MX_CACHE_MAX_BYTES="10MB").address


def test_get_says_what_came_from_where(server: str, tmp_path: Path) -> None:
    first = data(mx(server, "get", REPOSITORY, "--json", "--to", str(tmp_path / "to"), "--streams", "3"))
    assert first["received_bytes"] == first["bytes"] == TOTAL
    assert first["folder"] == str(tmp_path / "to")
    again = data(mx(server, "get", REPOSITORY, "--json", "--to", str(tmp_path / "to")))
    assert (again["downloaded_bytes"], again["received_bytes"]) == (0, 0)
    assert again["revision"] == first["revision"]
    assert files_below(tmp_path / "to") == FILE_DIGESTS


def test_get_of_a_branch_into_a_hub_cache_names_it(server: str, tmp_path: Path, hub: HubStandIn) -> None:
    commit = hub.add(REPOSITORY, {"config.json": b"{2}"}, ref="dev")
    got = data(mx(server, "get", REPOSITORY, "--revision", "dev", "--hub-cache", str(tmp_path), "--json"))
    assert (got["revision"], got["files"], got["bytes"]) == (commit, 1, 3)
    assert (tmp_path / "models--org--tiny-1.0" / "refs" / "dev").read_text() == commit
    assert Path(got["snapshot"]).name == commit


def test_list_shows_limits_and_marks(server: str) -> None:
    assert mx(server, "get", REPOSITORY, "--ignore-weights", "--pin").exit_code == 0
    listed = data(mx(server, "list", "--json"))
    assert listed["max_bytes"] == 10_000_000
    assert listed["free_bytes"] > 0
    (model,) = listed["models"]
    light = sum(len(content) for path, content in FILES.items() if path not in WEIGHTS)
    assert (model["provider"], model["weights"], model["pinned"], model["in_use"]) == (
        "hugging_face",
        False,
        True,
        False,
    )
    assert model["bytes"] == listed["used_bytes"] == light
    assert model["last_used_ms"] > 1_600_000_000_000
    printed = mx(server, "list").stdout
    assert "pinned" in printed
    assert "without weights" in printed


def test_rm_of_one_revision_and_by_force(server: str, hub: HubStandIn) -> None:
    old = data(mx(server, "get", REPOSITORY, "--json"))["revision"]
    hub.add(REPOSITORY, FILES | {"config.json": b"{}"})
    new = data(mx(server, "get", REPOSITORY, "--pin", "--json"))["revision"]
    removed = data(mx(server, "rm", REPOSITORY, "--revision", old, "--json"))
    assert removed["name"] == REPOSITORY
    assert [model["revision"] for model in data(mx(server, "list", "--json"))["models"]] == [new]
    refused = mx(server, "rm", REPOSITORY, "--json")
    assert refused.exit_code == 5
    assert json.loads(refused.stdout)["error"]["code"] == "MX_MODEL_IN_USE"
    assert "mx models pin --off" in refused.stderr
    assert mx(server, "rm", REPOSITORY, "--force").exit_code == 0
    gone = mx(server, "rm", REPOSITORY)
    assert (gone.exit_code, gone.stdout) == (4, "")
    assert "is not cached" in gone.stderr
    assert data(mx(server, "list", "--json"))["used_bytes"] == 0


@pytest.mark.parametrize("command", ["validate", "pin"])
def test_commands_on_what_is_not_there(server: str, command: str) -> None:
    missing = mx(server, command, "org/none", "--json")
    assert missing.exit_code == 4
    assert json.loads(missing.stdout)["error"]["exit_code"] == 4
    assert "org/none" in missing.stderr
    assert missing.stderr.startswith("mx: ")
    assert missing.stderr.count("\n") == 1


def test_model_that_cannot_fit(server: str, hub: HubStandIn) -> None:
    hub.add("org/huge", {"model.safetensors": bytes(11_000_000)})
    failed = mx(server, "get", "org/huge", "--json")
    assert failed.exit_code == 1
    assert "MX_CACHE_MAX_BYTES" in failed.stderr
    assert "MX_CACHE_MAX_BYTES" in json.loads(failed.stdout)["error"]["message"]


def test_folder_that_cannot_be_written(server: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed = mx(server, "get", REPOSITORY, "--to", str(tmp_path / "file" / "below"))
    assert failed.exit_code == 1
    assert "file" in failed.stderr


@pytest.mark.parametrize(
    "arguments", [["get"], ["get", REPOSITORY, "--streams", "0"], ["get", REPOSITORY, "--streams", "65"], ["pin"]]
)
def test_usage(arguments: list[str]) -> None:
    assert mx("127.0.0.1:1", *arguments).exit_code == 2
