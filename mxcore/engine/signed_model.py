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
from mxcore.storage.signed import SignedManifest, VerifiedFiles, trusted_manifest
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
    key, certificates = settings.model_signature_key, settings.model_signature_ca
    if bool(key) == bool(certificates):
        raise SignatureError(
            "MX_MODEL_SIGNATURE=require wants one of MX_MODEL_SIGNATURE_KEY (a public key) and MX_MODEL_SIGNATURE_CA "
            f"(certificates), and has {'both' if key else 'none'}: nothing is loaded"
        )
    folder = find_checkpoint(model, revision, download_dir).folder
    data, name = _signature(settings.model_signature_file, folder, uri)
    manifest = trusted_manifest(
        data, name, key=Path(key) if key else None, certificates=Path(certificates) if certificates else None
    )
    _log.info("%s: %d files were signed, their manifest is %s", name, len(manifest.files), manifest.digest)
    if folder is not None:
        VerifiedFiles(manifest, LocalFolder(folder)).check_small()
    return manifest


def _refuse_misspelt() -> None:
    """A name that looks like ours and is none must not open what it was to close."""
    for name, near in environment.misspelt(os.environ):
        if "SIGNATURE" in {*name.split("_"), *(near or "").split("_")}:
            raise SignatureError(
                f"{name} is no setting{f', did you mean {near}?' if near else ''} it looks like one that requires "
                "signatures, so nothing is loaded: correct or unset it (docs/signing.md)"
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
        "(docs/signing.md), or name the signature's file by MX_MODEL_SIGNATURE_FILE"
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
