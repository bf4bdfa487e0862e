"""What goes wrong around a load: the engine starts all the same, with the right weights, and says what happened."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxbench.demo.workers import Server
from mxbench.fleet.free_ports import free_port
from tests.vllm.conftest import References
from tests.vllm.engines import EngineHost

IMPATIENT = {"stall_timeout_seconds": 1, "transfer_timeout_seconds": 5, "server_timeout_seconds": 3}


def warnings_of_ours(log: str) -> list[str]:
    ours = [
        "loading",
        "loaded",
        "report",
        "loader",
        "serving",
        "membership",
        "record",
        "settings",
        "receiver",
        "heartbeat",
    ]
    return [line for line in log.splitlines() if "WARNING" in line and any(f"[{name}.py:" in line for name in ours)]


def test_a_corrupt_source_is_found_out(
    source: EngineHost, target: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    model = model_paths["qwen3"]
    source.load(model)
    assert source.ask("corrupt", name="down_proj.weight")["flipped"] > 0
    loaded = target.load(model)

    assert loaded.answers == references.of(model)
    assert loaded.report["path"] == "storage"
    assert "MX_DIGEST_MISMATCH" in loaded.report["fallbacks"][0]
    assert loaded.report["serving"]


def test_what_vllm_keeps_for_the_next_model_is_not_left_corrupt(
    source: EngineHost, target: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    """Rotary embeddings are kept by vLLM across models of a process: a failed transfer must not stay in them."""
    model = model_paths["llama"]
    source.load(model)
    assert source.ask("corrupt", name="cos_sin_cache")["flipped"] == 0  # no weight: not even offered
    assert source.ask("corrupt", name="down_proj.weight")["flipped"] > 0
    loaded = target.load(model)
    again = target.load(model, "auto")

    assert loaded.report["path"] == "storage"
    assert loaded.answers == again.answers == references.of(model)


@pytest.mark.parametrize("how", ["freeze", "kill"])
def test_a_source_that_is_frozen_or_killed(
    how: str, folder: Path, server: str, target: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    model = model_paths["llama"]
    lost = EngineHost(f"lost-{how}", folder, server)
    try:
        assert lost.load(model).report["serving"]
        getattr(lost, how)()
        loaded = target.load(model, extra=IMPATIENT)
    finally:
        if how == "freeze":
            lost.thaw()
        lost.close()

    assert loaded.answers == references.of(model)
    assert loaded.report["path"] == "storage"
    assert loaded.report["serving"]


def test_no_server(target: EngineHost, references: References, model_paths: dict[str, Path]) -> None:
    loaded = target.load(model_paths["llama"], extra={"server_address": None})

    assert loaded.answers == references.of(model_paths["llama"])
    assert (loaded.report["path"], loaded.report["serving"]) == ("storage", False)
    (warning,) = warnings_of_ours(loaded.log)
    assert "MODEL_EXPRESS_URL" in warning


def test_a_server_that_is_not_there(target: EngineHost, references: References, model_paths: dict[str, Path]) -> None:
    address = f"127.0.0.1:{free_port()}"
    loaded = target.load(model_paths["llama"], extra={"server_address": address, "server_timeout_seconds": 2})

    assert loaded.answers == references.of(model_paths["llama"])
    assert loaded.report["path"] == "storage"
    assert address in loaded.report["fallbacks"][0]
    assert address in warnings_of_ours(loaded.log)[0]


@pytest.fixture
def guarded(folder: Path, source: EngineHost, target: EngineHost) -> Iterator[str]:
    """The address of a server that takes records from the source alone."""
    tokens = folder / "tokens"
    tokens.mkdir()
    lines = []
    for host, role in ((source, "publish"), (target, "read")):
        (tokens / role).write_text(f"{role}-0123456789")
        digest = hashlib.sha256((tokens / role).read_bytes()).hexdigest()
        lines.append(f'[[tokens]]\nname = "{role}"\nrole = "{role}"\nsha256 = "{digest}"\n')
        host.ask("setenv", environ={"MX_AUTH_TOKEN_PATH": str(tokens / role)})
    (tokens / "access.toml").write_text("".join(lines))
    server = Server(tokens, {"MX_AUTH": "file", "MX_AUTH_FILE": str(tokens / "access.toml")})
    try:
        yield server.start()
    finally:
        for host in (source, target):
            host.ask("leave")
            host.ask("setenv", environ={"MX_AUTH_TOKEN_PATH": None})
        server.child.stop()


def test_who_cannot_be_published_takes_weights_all_the_same(
    guarded: str,
    source: EngineHost,
    target: EngineHost,
    references: References,
    model_paths: dict[str, Path],
) -> None:
    """A token that may only read; a store whose disk is full, or a Redis without room, looks the same."""
    model, extra = model_paths["llama"], {"server_address": guarded}
    assert source.load(model, extra=extra).report["serving"]
    loaded = target.load(model, extra=extra)

    assert loaded.answers == references.of(model)
    assert loaded.report["path"] == "p2p"
    assert loaded.report["fallbacks"][0].endswith("does not take this worker's record")
    assert "this worker is not known to the server yet" in warnings_of_ours(loaded.log)[0]


def test_settings_of_the_extra_configuration(
    target: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    """A bad value and a misspelt name warn, and change nothing."""
    extra = {"layout": "boiled", "stall_timeout": 3}
    loaded = target.load(model_paths["llama"], extra=extra)

    assert loaded.answers == references.of(model_paths["llama"])
    assert loaded.report["layout"] == "raw"
    warnings = "\n".join(warnings_of_ours(loaded.log))
    assert "boiled" in warnings
    assert "stall_timeout" in warnings


def test_a_report_that_cannot_be_written(
    target: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    loaded = target.load(model_paths["llama"], extra={"report_path": "/nowhere/report.json"})

    assert loaded.answers == references.of(model_paths["llama"])
    assert "writing the report failed" in loaded.log


def test_speculation_without_a_draft_model_changes_nothing(
    source: EngineHost, folder: Path, server: str, references: References, model_paths: dict[str, Path]
) -> None:
    """vLLM then names the model itself as the draft.

    In a process of its own: ngram brings numba, whose llvmlite vLLM's scan of all modules stumbles over when the same
    process makes another engine.
    """
    model = model_paths["llama"]
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    source.load(model)
    host = EngineHost("speculating", folder, server)
    try:
        loaded = host.load(model, speculative_config=speculative)
    finally:
        host.close()

    assert not loaded.report_path.with_name(f"{loaded.report_path.name}.draft").exists()
    assert (loaded.report["path"], loaded.report["serving"]) == ("p2p", True)
    assert [answer[0] for answer in loaded.answers] == [answer[0] for answer in references.of(model)]


def test_what_keeps_a_worker_from_the_server_is_in_its_summary(
    source: EngineHost, references: References, model_paths: dict[str, Path]
) -> None:
    """An address that cannot be used, and a misspelt name that would have protected the calls: storage, and why."""
    model = model_paths["llama"]
    unusable = source.load(model, extra={"server_address": "ftp://mx:1"})
    source.ask("setenv", environ={"MX_TLS_CA_FIEL": "/ca"})
    misspelt = source.load(model)
    source.ask("setenv", environ={"MX_TLS_CA_FIEL": None})

    for loaded, said in (
        (
            unusable,
            "MX_SERVER_ADDRESS='ftp://mx:1' is refused: server address 'ftp://mx:1': the scheme 'ftp' is not known",
        ),
        (
            misspelt,
            "joining: MX_TLS_CA_FIEL is no setting, did you mean MX_TLS_CA_FILE? it looks like one that protects",
        ),
    ):
        assert loaded.answers == references.of(model)
        assert (loaded.report["path"], loaded.report["serving"]) == ("storage", False)
        assert loaded.report["fallbacks"][0].startswith(said)
        [summary] = [line for line in loaded.log.splitlines() if "rank 0: storage" in line]
        assert said in summary
