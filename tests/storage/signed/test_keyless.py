"""Keyless signatures: by an identity that a Sigstore certified, checked without a network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from mxcore.errors import SignatureError, SignatureInvalid
from mxcore.storage.signed import KeylessSigner, SignedManifest, trusted_manifest
from tests.storage.signed.keyless import OwnSigstore
from tests.storage.signed.signing import Key

WHO, ISSUER = "release@models.example", "https://accounts.models.example"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return Key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def sigstore() -> OwnSigstore:
    return OwnSigstore()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def signed(model: Path, key: Key, sigstore: OwnSigstore, who: str = WHO) -> bytes:
    signature = key.sign(model)
    sigstore.certify(signature, key.public_key, who, ISSUER)
    return signature.read_bytes()


def manifest(data: bytes, trust: Path, who: str = WHO, issuer: str = ISSUER) -> SignedManifest:
    return trusted_manifest(data, "model.sig", keyless=KeylessSigner(who, issuer, trust))


@pytest.mark.parametrize("whole", [False, True], ids=["trusted root", "trust configuration"])
@pytest.mark.parametrize("who", [WHO, "https://code.example/models/.github/workflows/release.yml@refs/tags/v1"])
def test_what_an_identity_signed_is_the_manifest_that_a_key_signs(
    model: Path, key: Key, sigstore: OwnSigstore, tmp_path: Path, who: str, whole: bool
) -> None:
    trust = sigstore.trust(tmp_path / "trust.json", whole=whole)
    found = manifest(signed(model, key, sigstore, who), trust, who)
    assert found.digest == trusted_manifest(key.sign(model).read_bytes(), "model.sig", key=key.public).digest
    assert set(found.files) == {"config.json", "model.safetensors"}


def changed(data: bytes, *path: str | int, to: Any) -> bytes:
    bundle: Any = json.loads(data)
    inside = bundle
    for name in path[:-1]:
        inside = inside[name]
    inside[path[-1]] = to
    return json.dumps(bundle).encode()


@pytest.mark.parametrize(
    ("who", "issuer", "said"),
    [
        ("other@models.example", ISSUER, "do not match other@models.example"),
        (WHO, "https://accounts.other.example", "OIDCIssuer does not match"),
    ],
)
def test_another_identity_is_another_signer(
    model: Path, key: Key, sigstore: OwnSigstore, tmp_path: Path, who: str, issuer: str, said: str
) -> None:
    trust = sigstore.trust(tmp_path / "trust.json")
    with pytest.raises(SignatureInvalid, match=rf"no signature that {who}.*{said}"):
        manifest(signed(model, key, sigstore), trust, who, issuer)


def test_another_sigstore_is_not_believed(model: Path, key: Key, sigstore: OwnSigstore, tmp_path: Path) -> None:
    data = signed(model, key, sigstore)
    with pytest.raises(SignatureInvalid, match="certificate chain"):
        manifest(data, OwnSigstore().trust(tmp_path / "other.json"))
    for log in ("certificate_log", "signature_log"):
        forged = OwnSigstore()
        forged.authority, forged._key, forged.now = sigstore.authority, sigstore._key, sigstore.now
        kept = "signature_log" if log == "certificate_log" else "certificate_log"
        setattr(forged, kept, getattr(sigstore, kept))
        with pytest.raises(SignatureInvalid, match=r"SCT|log entry"):
            manifest(signed(model, key, forged), sigstore.trust(tmp_path / "trust.json"))


ENTRY = ("verificationMaterial", "tlogEntries", 0)


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("dsseEnvelope", "payload"), "e30="),
        (("dsseEnvelope", "signatures", 0, "sig"), "AAAA"),
        ((*ENTRY, "integratedTime"), "1"),
        ((*ENTRY, "inclusionProof", "rootHash"), "A" * 43 + "="),
        ((*ENTRY, "inclusionPromise", "signedEntryTimestamp"), "AAAA"),
        ((*ENTRY, "canonicalizedBody"), "e30="),
        (("verificationMaterial", "tlogEntries"), []),
        (("mediaType",), "another"),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, tuple) else "",
)
def test_what_was_changed_afterwards_is_no_signature(
    model: Path, key: Key, sigstore: OwnSigstore, tmp_path: Path, path: tuple[str | int, ...], to: Any
) -> None:
    data = changed(signed(model, key, sigstore), *path, to=to)
    with pytest.raises(SignatureInvalid, match="nothing is loaded"):
        manifest(data, sigstore.trust(tmp_path / "trust.json"))


def test_a_signature_by_a_key_is_none_by_an_identity(
    model: Path, key: Key, sigstore: OwnSigstore, tmp_path: Path
) -> None:
    with pytest.raises(SignatureInvalid):
        manifest(key.sign(model).read_bytes(), sigstore.trust(tmp_path / "trust.json"))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"trustedRoot": {}}'])
def test_a_trusted_root_that_is_none_is_said_to_be_one(
    model: Path, key: Key, sigstore: OwnSigstore, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "trust.json"
    file.write_text(text)
    with pytest.raises(SignatureError, match="cannot be used to verify signatures"):
        manifest(signed(model, key, sigstore), file)
