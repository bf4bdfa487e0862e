"""A model's signature, checked by the `model_signing` library.

The library's own `verify` reads the whole model to make a manifest of it, and compares that with the signed one. Ours
are read later, by whoever loads them: here the library is given a manifest that only takes note of what is compared
with it. All of it is the library's public interface.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from mxcore.errors import SignatureError, SignatureInvalid
from mxcore.storage.signed.manifest import SignedManifest
from mxserver.wire import install_command

__all__ = ["KeylessSigner", "trusted_manifest"]

_log = logging.getLogger(__name__)

_TRUST_CONFIG = "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json"
_SIGNING_CONFIG = "application/vnd.dev.sigstore.signingconfig.v0.2+json"


class KeylessSigner(NamedTuple):
    """Who signs without a key of his own, by Sigstore: an identity (an address, a workflow's URI) as an OpenID Connect
    issuer knows it. `trust` is a file: a trusted root, or a client's trust configuration; nothing is fetched.
    """

    identity: str
    issuer: str
    trust: Path

    def __str__(self) -> str:
        return f"{self.identity} (by {self.issuer}, {self.trust})"


class _Noted:
    """Stands where the library has the manifest of the files that it has read; equal to all."""

    def __init__(self) -> None:
        self.signed: Any = None

    def __ne__(self, other: object) -> bool:
        self.signed = other
        return False

    __hash__ = object.__hash__


class _ReadLater:
    """Stands where the library has its way to read files."""

    def __init__(self) -> None:
        self.noted = _Noted()

    def add_ignored_paths(self, **_: object) -> None:
        """The signed manifest has them too."""

    def hash(self, _model: object, **_options: object) -> _Noted:
        return self.noted


def trusted_manifest(
    signature: bytes,
    name: str,
    *,
    key: Path | None = None,
    certificates: Path | None = None,
    keyless: KeylessSigner | None = None,
) -> SignedManifest:
    """What the signature promises, if it is by the private key of `key`, of a certificate that `certificates` trust, or
    by `keyless`.

    `signature` are the bytes of a Sigstore bundle as `model_signing sign` writes it, `name` is what messages call it.
    `key` and `certificates` are PEM files; one of the three is given. No file of the model is read, and no network is
    used. Raises SignatureError where the library is not installed, or what is trusted cannot be read; SignatureInvalid
    for a signature by somebody else, of other contents, or none.
    """
    try:
        verifying: Any = import_module("model_signing.verifying")  # heavy, and an extra
    except ImportError as error:
        raise SignatureError(f"signatures cannot be verified: {error}: {install_command('signing')}") from error
    trusted = key or certificates or keyless
    try:
        config = verifying.Config()
        if key is not None:
            config.use_elliptic_key_verifier(public_key=key)
        elif keyless is not None:
            with _file_of(_trust_config(keyless.trust)) as trust:
                config.use_sigstore_verifier(identity=keyless.identity, oidc_issuer=keyless.issuer, trust_config=trust)
        else:
            config.use_certificate_verifier(certificate_chain=[certificates])
    except Exception as error:
        raise SignatureError(f"{trusted} cannot be used to verify signatures: {_said(error)}") from error
    later = _ReadLater()
    try:
        with _file_of(signature) as path:
            config.set_hashing_config(later).verify(path.parent, path)
        signed = later.noted.signed
        serialization = signed.serialization_type
        return SignedManifest.of(
            ((one.identifier, one.digest.algorithm, one.digest.digest_hex) for one in signed.resource_descriptors()),
            sharded=serialization["method"] == "shards",
            ignored=(str(path) for path in serialization.get("ignore_paths", ())),
            signature=name,
        )
    except SignatureError:
        raise
    except Exception as error:
        raise SignatureInvalid(
            f"{name} is no signature that {trusted} verifies: {_said(error)}; nothing is loaded. Take the signature "
            "and the key from whoever signed the model"
        ) from error


def _trust_config(file: Path) -> bytes:
    """As the library reads it; most Sigstores give their trusted root alone (`trusted_root.json`)."""
    data = file.read_bytes()
    given = json.loads(data)
    if "trustedRoot" in given:
        return data
    around = {"mediaType": _TRUST_CONFIG, "trustedRoot": given, "signingConfig": {"mediaType": _SIGNING_CONFIG}}
    return json.dumps(around).encode()


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _file_of(data: bytes) -> Iterator[Path]:
    """The library reads signatures, and whom to trust, from files."""
    with TemporaryDirectory(prefix="mx-signature-") as folder:
        path = Path(folder, "model.sig")
        path.write_bytes(data)
        yield path
