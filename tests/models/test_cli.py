"""`mx models` against a server, in this process and as a program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mxbench.stand_ins.hub import HubStandIn
from mxcore.cli.connection import Connection
from mxcore.cli.models import models
from mxserver.wire import SettingError
from tests.models.conftest import FILE_DIGESTS, FILES, REPOSITORY, WEIGHTS, StartServer, files_below
from tests.models.models_command import data, mx


@pytest.fixture
def server(start_server: StartServer) -> str:
    return start_server().address


def test_life_of_a_model(server: str, tmp_path: Path, hub: HubStandIn) -> None:
    commit = hub.repositories[REPOSITORY].refs["main"]
    total = sum(map(len, FILES.values()))
    got = data(mx(server, "get", REPOSITORY, "--pin", "--json", "--to", str(tmp_path / "to")))
    assert (got["revision"], got["files"], got["bytes"]) == (commit, len(FILES), total)
    assert files_below(tmp_path / "to") == FILE_DIGESTS
    listed = data(mx(server, "list", "--json"))
    (model,) = listed["models"]
    assert (model["name"], model["bytes"], model["pinned"], model["weights"]) == (REPOSITORY, total, True, True)
    assert data(mx(server, "validate", REPOSITORY, "--json"))["damaged"] == {}
    assert mx(server, "rm", REPOSITORY).exit_code == 5
    assert data(mx(server, "pin", "--off", REPOSITORY, "--json"))["pinned"] is False
    assert mx(server, "rm", REPOSITORY).exit_code == 0
    assert data(mx(server, "list", "--json"))["models"] == []


def test_text_says_the_same(server: str) -> None:
    assert "5 files" in mx(server, "get", REPOSITORY).stdout
    printed = mx(server, "list").stdout
    assert REPOSITORY in printed
    assert "1 model," in printed
    assert "0 damaged" in mx(server, "validate", REPOSITORY).stdout


def test_hub_cache(server: str, tmp_path: Path) -> None:
    got = data(mx(server, "get", REPOSITORY, "--ignore-weights", "--hub-cache", str(tmp_path / "hub"), "--json"))
    assert set(files_below(Path(got["snapshot"]))) == set(FILES) - WEIGHTS


def test_validate_finds_what_is_damaged(server: str, cache_folder: Path) -> None:
    assert mx(server, "get", REPOSITORY).exit_code == 0
    snapshot = next((cache_folder / "models--org--tiny-1.0" / "snapshots").iterdir())
    weights = (snapshot / "model-00002-of-00002.safetensors").resolve()
    damaged = bytearray(weights.read_bytes())
    damaged[700_000] ^= 4
    weights.write_bytes(damaged)
    (snapshot / "config.json").resolve().unlink()
    (snapshot / "extra" / "nested" / "tokenizer.json").resolve().write_bytes(b"short")
    result = mx(server, "validate", REPOSITORY, "--json")
    assert result.exit_code == 6
    problems = json.loads(result.stdout)["damaged"]
    assert "digest" in problems["model-00002-of-00002.safetensors"]
    assert "cannot be read" in problems["config.json"]
    assert "5 bytes" in problems["extra/nested/tokenizer.json"]
    assert len(problems) == 3


def test_exit_codes(server: str, hub: HubStandIn) -> None:
    assert mx(server, "get", "org/none").exit_code == 4
    assert mx(server, "get", REPOSITORY, "--revision", "none").exit_code == 4
    assert mx(server, "validate", REPOSITORY).exit_code == 4
    assert mx(server, "get", "a/b/c").exit_code == 2
    assert mx(server, "no-such-command").exit_code == 2
    assert mx("no port:x", "list").exit_code == 2
    hub.repositories[REPOSITORY].gated = True
    failed = mx(server, "get", REPOSITORY)
    assert failed.exit_code == 1
    assert "HF_TOKEN" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert mx("127.0.0.1:1", "list").exit_code == 3
    assert mx("127.0.0.1:1", "get", REPOSITORY, "--wait", "0").exit_code == 3


def test_address_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Connection().address == "localhost:8001"
    monkeypatch.setenv("MX_SERVER_ADDRESS", "http://second:1")
    assert Connection().address == "second:1"
    monkeypatch.setenv("MODEL_EXPRESS_URL", "first:2")
    assert Connection().address == "first:2"
    assert Connection("third").address == "third:8001"
    with pytest.raises(SettingError):
        _ = Connection("ftp://x").address


@pytest.mark.parametrize("place", ["before", "after", "both"])
def test_the_server_may_be_named_after_the_command(server: str, place: str) -> None:
    named = ["--server", server]
    words = {
        "before": [*named, "list", "--json"],
        "after": ["list", "--json", *named],
        "both": ["--server", "nobody.invalid:1", "list", "--json", *named],
    }
    assert data(CliRunner().invoke(models, words[place]))["models"] == []


def test_help_is_light_and_ends_with_examples() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom mxcore.cli.models import models\n"
        "printed = CliRunner().invoke(models, ['--help'])\n"
        "assert printed.exit_code == 0 and 'Examples:' in printed.output\n"
        "print([name for name in ('torch', 'grpc', 'huggingface_hub', 'xxhash') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_client_needs_no_torch() -> None:
    code = "import sys, mxserver.wire.files\nprint([n for n in ('torch', 'huggingface_hub') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
