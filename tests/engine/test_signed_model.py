"""MX_MODEL_SIGNATURE=require, in loads of an engine: real signatures, files, server and sockets."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is the engine's")

from mxbench.stand_ins.s3_server import S3Server, environment  # noqa: E402
from mxcore.engine import leave, load  # noqa: E402
from mxcore.errors import SignatureError, SignatureInvalid, SignedFileMismatch  # noqa: E402
from mxserver.wire.calls import ServerClient  # noqa: E402
from tests.engine.plain_engine import PlainEngine, answer, write_checkpoint  # noqa: E402
from tests.engine.plain_worker import ROLES  # noqa: E402
from tests.engine.test_plain_engine import options, started  # noqa: E402
from tests.storage.signed.keyless import OwnSigstore  # noqa: E402
from tests.storage.signed.signing import Key  # noqa: E402


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return Key(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def folder(tmp_path: Path, key: Key) -> Path:
    made = write_checkpoint(tmp_path / "model")
    (made / "config.json").write_text("{}")
    key.sign(made)
    return made


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MODEL_EXPRESS_URL", "MX_SERVER_ADDRESS", "MX_MODEL_URI", "MX_LOAD_PATHS"):
        monkeypatch.delenv(name, raising=False)
    yield
    leave("the test ends")


def signed(key: Key, **more: Any) -> dict[str, Any]:
    return {"model_signature": "require", "model_signature_key": str(key.public), **more}


def test_what_was_signed_is_loaded_and_the_log_says_what_it_cost(
    folder: Path, key: Key, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answer(load(PlainEngine(folder, {}), ROLES["both"]))
    caplog.set_level(logging.INFO)
    report = folder.parent / "report.json"
    given = signed(key, report_path=str(report))
    assert answer(load(PlainEngine(folder, given), ROLES["both"])) == expected
    assert json.loads(report.read_text())["fallbacks"] == ["joining: no server is set"]
    [line] = [record.getMessage() for record in caplog.records if "are what was signed" in record.getMessage()]
    size_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.name != "model.sig")
    assert f"3 files are what was signed: {size_bytes} bytes hashed in " in line
    assert "% of " in line


def flip_a_weight(folder: Path) -> None:
    with (folder / "model-1.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0] ^ 1
        file.seek(-1, 2)
        file.write(bytes([byte]))


TAMPERED = {
    "weights": (flip_a_weight, "model-1.safetensors is sha256"),
    "config": (lambda folder: (folder / "config.json").write_text("[]"), "config.json is sha256"),
    "added": (lambda folder: (folder / "more.json").write_text("{}"), "not signed: more.json"),
    "missing": (lambda folder: (folder / "config.json").unlink(), "lacks files that were signed: config.json"),
}


@pytest.mark.parametrize("place", ["engine", "uri"])
@pytest.mark.parametrize("tampered", TAMPERED)
def test_storage_that_is_not_what_was_signed_ends_the_start(
    folder: Path, tmp_path: Path, key: Key, tampered: str, place: str
) -> None:
    """At the first place that has it: no other one is tried, good as it may be."""
    change, said = TAMPERED[tampered]
    other = write_checkpoint(tmp_path / "other")
    (other / "config.json").write_text("{}")
    key.sign(other)
    change(folder)
    if place == "engine":
        engine = PlainEngine(folder, signed(key))
    else:
        engine = PlainEngine(other, signed(key, model_uri=str(folder)))
    with pytest.raises(SignedFileMismatch, match=said):
        load(engine, ROLES["both"])
    assert engine.events.count("build") <= 1
    assert "process" not in engine.events


@pytest.mark.parametrize("tampered", [None, "weights", "added", "missing"])
def test_what_an_object_store_has_is_verified(
    folder: Path, tmp_path: Path, key: Key, tampered: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signature and files of a real server's bucket; the engine's own folder has the configuration, signed too."""
    expected = answer(load(PlainEngine(folder, {}), ROLES["both"]))
    stored = shutil.copytree(folder, tmp_path / "s3" / "models" / "m")
    if tampered is not None:
        TAMPERED[tampered][0](stored)
    given = signed(key, model_uri="s3://models/m")
    with S3Server(tmp_path / "s3") as server:
        for name, value in environment(server.address).items():
            monkeypatch.setenv(name, value)
        engine = PlainEngine(folder, given)
        if tampered is None:
            assert answer(load(engine, ROLES["both"])) == expected
        else:
            with pytest.raises(SignedFileMismatch, match=TAMPERED[tampered][1]):
                load(engine, ROLES["both"])
            assert "process" not in engine.events


def test_no_signature_or_one_by_another_key_ends_the_start(folder: Path, tmp_path: Path, key: Key) -> None:
    with pytest.raises(SignatureInvalid, match="Key mismatch"):
        load(PlainEngine(folder, signed(Key(tmp_path, "other"))), ROLES["both"])
    (folder / "model.sig").unlink()
    engine = PlainEngine(folder, signed(key))
    with pytest.raises(SignatureInvalid, match=r"there is no signature \(.*model/model.sig\)"):
        load(engine, ROLES["both"])
    assert engine.events == []


def test_a_signature_may_lie_elsewhere(folder: Path, tmp_path: Path, key: Key) -> None:
    elsewhere = (folder / "model.sig").rename(tmp_path / "elsewhere.sig")
    load(PlainEngine(folder, signed(key, model_signature_file=str(elsewhere))), ROLES["both"])


def test_a_misspelt_word_does_not_open_and_a_key_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MX_MODEL_SIGNATURE", "requre")
    with pytest.raises(SignatureError, match="wants one of MX_MODEL_SIGNATURE_KEY"):
        load(PlainEngine(folder, {}), ROLES["both"])
    monkeypatch.delenv("MX_MODEL_SIGNATURE")
    monkeypatch.setenv("MX_MODEL_SIGNTURE", "require")
    with pytest.raises(SignatureError, match="did you mean MX_MODEL_SIGNATURE"):
        load(PlainEngine(folder, {}), ROLES["both"])
    monkeypatch.delenv("MX_MODEL_SIGNTURE")
    monkeypatch.setenv("MX_MODEL_SIGNATURE", "off")
    load(PlainEngine(folder, {}), ROLES["both"])


def test_an_engine_whose_weights_pass_us_by_is_refused(folder: Path, key: Key) -> None:
    class Own(PlainEngine):
        def fill(self, model, source, settings, progress):  # type: ignore[no-untyped-def]
            for parameter in model.parameters():
                parameter.zero_()
            return 0

    with pytest.raises(SignatureError, match="were not read by what verifies signatures"):
        load(Own(folder, signed(key)), ROLES["both"])


def test_who_takes_from_a_worker_that_verified_the_manifest_names_it_too(server: str, folder: Path, key: Key) -> None:
    """`tests/transfer/member/test_membership.py` has those that are refused."""
    report_path = folder.parent / "report.json"
    with started(folder, "both", signed(key, **options(server)), processed=True) as source:
        given = signed(key, **options(server, load_paths=["p2p"], report_path=str(report_path)))
        model = load(PlainEngine(folder, given, processed_weights_move=True), ROLES["both"])
        assert answer(model) == source["answer"]
        report = json.loads(report_path.read_text())
        assert report["source_worker"] == source["report"]["worker_id"]
        with ServerClient(server) as client:
            records = [client.get_metadata(one["source_id"], one["worker_id"]) for one in (source["report"], report)]
    [manifest] = {record.worker.signed_manifest for record in records if record is not None}
    assert len(manifest) == 64


def test_a_keyless_signature_is_taken_from_the_identity_that_is_named(folder: Path, tmp_path: Path, key: Key) -> None:
    """And refused where only a part of it is said, or somebody else's is asked for."""
    sigstore = OwnSigstore()
    sigstore.certify(folder / "model.sig", key.public_key, "release@models.example", "https://accounts.example")
    given = {
        "model_signature": "require",
        "model_signature_identity": "release@models.example",
        "model_signature_issuer": "https://accounts.example",
        "model_signature_trust": str(sigstore.trust(tmp_path / "trust.json")),
    }
    expected = answer(load(PlainEngine(folder, {}), ROLES["both"]))
    assert answer(load(PlainEngine(folder, given), ROLES["both"])) == expected
    with pytest.raises(SignatureInvalid, match=r"other@models\.example"):
        load(PlainEngine(folder, {**given, "model_signature_identity": "other@models.example"}), ROLES["both"])
    with pytest.raises(SignatureError, match="MX_MODEL_SIGNATURE_ISSUER and MX_MODEL_SIGNATURE_TRUST not set"):
        load(PlainEngine(folder, {name: given[name] for name in list(given)[:2]}), ROLES["both"])
    with pytest.raises(SignatureError, match=r"wants one of .* and has 2"):
        load(PlainEngine(folder, signed(key, **given)), ROLES["both"])
