"""MX_MODEL_SIGNATURE: what was signed of a load's model, and its weights in the pass that reads and verifies them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch

from mxcore.engine.model_files import UriPlace, find_checkpoint
from mxcore.errors import SignatureError, SignatureInvalid
from mxcore.settings import WorkerSettings
from mxcore.storage.checkpoint import Checkpoint
from mxcore.storage.load import Reader
from mxcore.storage.plan import Row
from mxcore.storage.remote import LocalFolder
from mxcore.storage.signed import KeylessSigner, SignedManifest, VerifiedFiles, trusted_manifest
from mxserver.wire import environment

__all__ = ["signed_manifest", "verified_weights"]

_log = logging.getLogger(__name__)


def signed_manifest(
    settings: WorkerSettings, model: str, revision: str | None, download_dir: str | None, uri: UriPlace | None
) -> SignedManifest | None:
    """What was signed; None where no signature is asked for. The engine's configuration and tokenizer are verified.

    Raises SignatureError, and what reading raises.
    """
    if settings.model_signature == "off":
        _refuse_misspelt()
        return None
    key, certificates, keyless = settings.model_signature_key, settings.model_signature_ca, _keyless(settings)
    given = sum(map(bool, (key, certificates, keyless)))
    if given != 1:
        raise SignatureError(
            "MX_MODEL_SIGNATURE=require wants one of MX_MODEL_SIGNATURE_KEY (a public key), MX_MODEL_SIGNATURE_CA "
            f"(certificates) and MX_MODEL_SIGNATURE_IDENTITY (of a keyless signature), and has {given or 'none'}: "
            "nothing is loaded"
        )
    folder = find_checkpoint(model, revision, download_dir).folder
    data, name = _signature(settings.model_signature_file, folder, uri)
    manifest = trusted_manifest(
        data,
        name,
        key=Path(key) if key else None,
        certificates=Path(certificates) if certificates else None,
        keyless=keyless,
    )
    _log.info("%s: %d files were signed, their manifest is %s", name, len(manifest.files), manifest.digest)
    if folder is not None:
        VerifiedFiles(manifest, LocalFolder(folder)).check_small()
    return manifest


def _keyless(settings: WorkerSettings) -> KeylessSigner | None:
    """Whose keyless signature is asked for. Raises SignatureError where only a part of that is said."""
    said = {
        "MX_MODEL_SIGNATURE_IDENTITY": settings.model_signature_identity,
        "MX_MODEL_SIGNATURE_ISSUER": settings.model_signature_issuer,
        "MX_MODEL_SIGNATURE_TRUST": settings.model_signature_trust,
    }
    missing = [name for name, value in said.items() if not value]
    if len(missing) == len(said):
        return None
    if missing:
        raise SignatureError(
            f"{' and '.join(missing)} not set: a keyless signature is by an identity, as an issuer knows it, and a "
            "trusted root's file says which Sigstore is believed (docs/how-to/signing.md): nothing is loaded"
        )
    identity, issuer, trust = said.values()
    return KeylessSigner(identity, issuer, Path(trust))


def _refuse_misspelt() -> None:
    """A name that looks like ours and is none must not open what it was to close."""
    for name, near in environment.misspelt(os.environ):
        if "SIGNATURE" in {*name.split("_"), *(near or "").split("_")}:
            raise SignatureError(
                f"{name} is no setting{f', did you mean {near}?' if near else ''} it looks like one that requires "
                "signatures, so nothing is loaded: correct or unset it (docs/how-to/signing.md)"
            )


def _signature(file: str, folder: Path | None, uri: UriPlace | None) -> tuple[bytes, str]:
    """The signature's bytes and its name."""
    places = [Path(file)] if Path(file).is_absolute() else []
    if not places:
        if uri is not None and not uri.uri.is_local:
            objects = uri.objects()
            if any(there.path == file for there in objects.files):
                return objects.whole(file), f"{objects.name}/{file}"
        places = [
            below / file
            for below in (uri.uri.folder if uri is not None and uri.uri.is_local else None, folder)
            if below
        ]
    for place in places:
        try:
            return place.read_bytes(), str(place)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SignatureInvalid(f"{place} cannot be read: {error.strerror}: nothing is loaded") from error
    tried = ", ".join(map(str, places)) or f"no folder of this machine that could have {file}"
    raise SignatureInvalid(
        f"MX_MODEL_SIGNATURE=require, and there is no signature ({tried}): nothing is loaded. Sign the model "
        "(docs/how-to/signing.md), or name the signature's file by MX_MODEL_SIGNATURE_FILE"
    )


def verified_weights(
    checkpoint: Checkpoint,
    names: Collection[str] | None,
    verified: VerifiedFiles,
    *,
    mode: str | None,
    told: Callable[[int], None] | None,
    read: Callable[[int], None],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) in file order from host memory; `VerifiedFiles.stream` says what is verified when.

    `told` is called with the bytes handed over so far, `read` with those that were read.
    """

    def progress(done_bytes: int, _total_bytes: int) -> None:
        if told is not None:
            told(done_bytes)

    with Reader(checkpoint.files, mode=mode, stamps=checkpoint.stamps) as reader:

        def read_rows(rows: Sequence[Row]) -> None:
            read(reader.read(rows).read_bytes)

        yield from verified.stream(checkpoint, read_rows, names, progress=progress)
