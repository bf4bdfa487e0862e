"""What was signed by the real library is verified while it is read, and nothing else passes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="tensors are handed over as torch's")

import torch
from safetensors.torch import save_file

from mxcore.errors import SignatureError, SignatureInvalid, SignedFileMismatch
from mxcore.storage.checkpoint import open_checkpoint
from mxcore.storage.load import Reader
from mxcore.storage.remote import LocalFolder, open_remote, stream_remote
from mxcore.storage.signed import SignedManifest, VerifiedFiles, trusted_manifest
from tests.storage.signed.signing import Key

ROWS = 70  # of 1000 floats: tensors that are no multiple of a page


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return Key(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        tensors = {f"{number}.{i}": torch.rand(ROWS, 1000, generator=generator) for i in range(4)}
        save_file(tensors, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "code").mkdir()
    (folder / "code" / "model.py").write_text("pass")
    return folder


def manifest_of(signature: Path, key: Key) -> SignedManifest:
    return trusted_manifest(signature.read_bytes(), str(signature), key=key.public)


def read(model: Path, manifest: SignedManifest, names: set[str] | None = None) -> tuple[dict[str, str], list[int]]:
    """Digests of the tensors as they were handed over, and how many bytes each read took of which files."""
    verified = VerifiedFiles(manifest, LocalFolder(model))
    verified.check_others()
    checkpoint = open_checkpoint(model)
    taken: dict[str, str] = {}
    reads = [0] * len(checkpoint.files)
    with Reader(checkpoint.files, stamps=checkpoint.stamps) as reader:

        def rows(wanted: list[tuple[int, ...]]) -> None:
            for row in wanted:
                reads[row[0]] += row[2]
            reader.read(wanted)

        for name, tensor in verified.stream(checkpoint, rows, names, batch_bytes=300_000):
            taken[name] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    verified.finish()
    assert "bytes hashed in" in verified.told(1.0)
    return taken, reads


@pytest.mark.parametrize(
    ("algorithm", "shard_bytes"),
    [("sha256", None), ("blake2", None), ("blake3", None), ("sha256", 100_000), ("sha256", 1_000_000_000)],
)
@pytest.mark.parametrize("names", [None, {"1.2", "2.0"}])
def test_each_byte_is_read_once(
    model: Path, key: Key, algorithm: str, shard_bytes: int | None, names: set[str] | None
) -> None:
    """Whole files, whatever of them is wanted: the digest is of the bytes that are handed over."""
    taken, reads = read(model, manifest_of(key.sign(model, algorithm, shard_bytes), key), names)
    assert reads == [file.stat().st_size for file in open_checkpoint(model).files]
    assert set(taken) == (names or {f"{number}.{i}" for number in range(3) for i in range(4)})


def test_the_manifest_is_the_same_whoever_signs(model: Path, tmp_path: Path, key: Key) -> None:
    by_key = manifest_of(key.sign(model), key)
    other = Key(tmp_path, "other")
    assert manifest_of(other.sign(model), other).digest == by_key.digest
    authority = tmp_path / "authority.pem"
    signature = other.sign_by_certificate(model, authority)
    assert trusted_manifest(signature.read_bytes(), "s", certificates=authority).digest == by_key.digest
    (model / "config.json").write_text("{ }")
    assert manifest_of(key.sign(model), key).digest != by_key.digest


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "first byte of the weights": (lambda model: flip(model / "model-0.safetensors", 500), "model-0.safetensors is sha"),
    "last byte of the weights": (lambda model: flip(model / "model-2.safetensors", -1), "model-2.safetensors is sha"),
    "config": (lambda model: (model / "config.json").write_text("[]"), "config.json is sha256"),
    "code": (lambda model: (model / "code" / "model.py").write_text("boom"), "code/model.py is sha256"),
    "a file added": (lambda model: (model / "extra.py").write_text("boom"), "not signed: extra.py"),
    "a weight file added": (
        lambda model: (model / "zzz.safetensors").write_bytes((model / "model-0.safetensors").read_bytes()),
        "not signed: zzz.safetensors",
    ),
    "a file missing": (lambda model: (model / "tokenizer.json").unlink(), "lacks files that were signed: tokenizer"),
    "a weight file missing": (
        lambda model: (model / "model-1.safetensors").unlink(),
        "files that were signed: model-1",
    ),
    "a file emptied": (lambda model: (model / "tokenizer.json").write_text(""), "tokenizer.json is sha256"),
    "a file swapped for a signed one": (
        lambda model: (model / "config.json").write_bytes((model / "tokenizer.json").read_bytes()),
        "config.json is sha256",
    ),
}


@pytest.mark.parametrize("tampered", TAMPERED)
def test_what_is_not_as_signed_is_refused_by_name(model: Path, key: Key, tampered: str) -> None:
    manifest = manifest_of(key.sign(model), key)
    change, said = TAMPERED[tampered]
    change(model)
    with pytest.raises(SignedFileMismatch, match=said):
        read(model, manifest)


def test_both_digests_are_named(model: Path, key: Key) -> None:
    manifest = manifest_of(key.sign(model), key)
    (model / "config.json").write_text("[]")
    right, wrong = (hashlib.sha256(text).hexdigest() for text in (b"{}", b"[]"))
    with pytest.raises(SignedFileMismatch, match=f"config.json is sha256 {wrong}, signed was {right}") as caught:
        read(model, manifest)
    assert caught.value.code == "MX_SIGNED_FILE_MISMATCH"


def test_shards_are_compared_one_by_one_and_nothing_may_follow(model: Path, key: Key) -> None:
    manifest = manifest_of(key.sign(model, shard_bytes=100_000), key)
    file = model / "model-1.safetensors"
    right = file.read_bytes()
    flip(file, 250_000)
    with pytest.raises(SignedFileMismatch, match=r"model-1.safetensors \(bytes 200000 to 300000\) is sha256"):
        read(model, manifest)
    file.write_bytes(right)
    (model / "config.json").write_text("{}" + " " * 10)
    with pytest.raises(SignedFileMismatch, match="longer than the 2 bytes"):
        read(model, manifest)


def test_a_signature_by_another_key_or_of_something_else_is_none(model: Path, tmp_path: Path, key: Key) -> None:
    signature = key.sign(model)
    other = Key(tmp_path, "other")
    for data, trusted in (
        (signature.read_bytes(), other),
        (b"{}", key),
        (b"", key),
        (signature.read_bytes().replace(b"payload", b"paylode"), key),
    ):
        with pytest.raises(SignatureInvalid, match="nothing is loaded"):
            trusted_manifest(data, "model.sig", key=trusted.public)
    with pytest.raises(SignatureError, match="cannot be used to verify"):
        trusted_manifest(signature.read_bytes(), "model.sig", key=tmp_path / "none.pub")
    authority = tmp_path / "authority.pem"
    other.sign_by_certificate(model, authority)
    third = Key(tmp_path, "third")
    with pytest.raises(SignatureInvalid, match="no signature that"):
        trusted_manifest(
            third.sign_by_certificate(model, tmp_path / "third.pem").read_bytes(), "model.sig", certificates=authority
        )


def test_a_file_that_is_replaced_after_its_header_was_read_is_refused(model: Path, key: Key) -> None:
    """The header that tensors are read by is the one that is hashed."""
    manifest = manifest_of(key.sign(model), key)
    checkpoint = open_checkpoint(model)
    file = model / "model-1.safetensors"
    renamed = file.read_bytes().replace(b'"1.0"', b'"1.x"').replace(b'"1.1"', b'"1.0"').replace(b'"1.x"', b'"1.1"')
    signed = file.read_bytes()
    file.write_bytes(renamed)
    swapped = open_checkpoint(model)
    file.write_bytes(signed)
    assert swapped["1.0"].offset == checkpoint["1.1"].offset
    with (
        Reader(swapped.files) as reader,
        pytest.raises(SignedFileMismatch, match="another header than when it was opened"),
    ):
        for _ in VerifiedFiles(manifest, LocalFolder(model)).stream(swapped, reader.read):
            pass


def test_weights_that_something_else_reads_are_not_used(model: Path, key: Key) -> None:
    verified = VerifiedFiles(manifest_of(key.sign(model), key), LocalFolder(model))
    verified.check_others()
    with pytest.raises(SignatureError, match=r"model-0.safetensors, model-1.safetensors, model-2.safetensors"):
        verified.finish()


def test_papers_and_copies_may_be_missing(model: Path, key: Key) -> None:
    for name in ("README.md", "LICENSE", "pytorch_model.bin"):
        (model / name).write_text("x")
    manifest = manifest_of(key.sign(model), key)
    for name in ("README.md", "LICENSE", "pytorch_model.bin"):
        (model / name).unlink()
    read(model, manifest)


def test_what_comes_from_elsewhere_is_verified_as_well(model: Path, key: Key) -> None:
    manifest = manifest_of(key.sign(model), key)
    folder = LocalFolder(model)
    verified = VerifiedFiles(manifest, folder)
    checkpoint = open_remote(folder)
    through = partial(verified.stream, checkpoint)
    assert len(list(stream_remote(folder, checkpoint, batch_bytes=300_000, through=through))) == 12
    verified.finish()
    flip(model / "model-1.safetensors", 5000)
    with pytest.raises(SignedFileMismatch, match=r"model-1.safetensors is sha256"):
        list(stream_remote(folder, checkpoint, through=partial(VerifiedFiles(manifest, folder).stream, checkpoint)))
