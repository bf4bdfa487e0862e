"""Names of models: providers, names and revisions, checked before they are used."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple, TypeAlias

from mxserver.models.errors import BadModelName
from mxserver.wire import path_problem
from mxserver.wire.proto import model_pb2

Provider: TypeAlias = model_pb2.ModelProvider.ValueType

SCHEMES: dict[Provider, tuple[str, ...]] = {
    model_pb2.S3: ("s3",),
    model_pb2.GCS: ("gs",),
    model_pb2.AZURE: ("az", "abfss"),
    model_pb2.FILE: ("file",),
}
"""Providers whose models are named by URL; the rest are repositories of the Hugging Face Hub."""

DEFAULT_REVISION = "main"

_REPO_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BUCKET = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@-]{0,251}[A-Za-z0-9])?")


class ModelName(NamedTuple):
    """A model of one provider, in any revision. Made by `model_name`."""

    provider: Provider
    name: str

    @property
    def provider_name(self) -> str:
        return model_pb2.ModelProvider.Name(self.provider)

    def __str__(self) -> str:
        return self.name


class ModelKey(NamedTuple):
    """One revision of one model: the unit of downloads, leases and eviction."""

    model: ModelName
    revision: str

    @property
    def id(self) -> str:
        """A file name for what belongs to this key: 32 hex digits."""
        text = "\n".join((self.model.provider_name, self.model.name, self.revision))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __str__(self) -> str:
        return f"{self.model.name}@{self.revision}"


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash, which never changes its meaning."""
    return _COMMIT.fullmatch(revision) is not None


def model_name(provider: int, name: str) -> ModelName:
    """Checks provider and name.

    Raises:
        BadModelName: says which rule is broken.
    """
    if provider == model_pb2.HUGGING_FACE:
        _check_repository(name)
        return ModelName(model_pb2.HUGGING_FACE, name)
    known = next((known for known in SCHEMES if known == provider), None)
    if known is None:
        label = "NGC" if provider == model_pb2.NGC else f"number {provider}"
        raise BadModelName(f"provider {label} is not served; there are HUGGING_FACE, GCS, S3, AZURE and FILE")
    return ModelName(known, _checked_url(known, name))


def _check_repository(name: str) -> None:
    parts = name.split("/")
    if len(parts) > 2 or not all(_REPO_PART.fullmatch(part) for part in parts) or "--" in name or ".." in name:
        raise BadModelName(
            f"model name {name[:200]!r} is not a repository of the hub: it must be NAME or ORGANISATION/NAME of "
            "letters, digits, '.', '_' and '-', without '--' and '..'"
        )


def _checked_url(provider: Provider, name: str) -> str:
    schemes = SCHEMES[provider]
    form = f"{schemes[0]}:///folder" if provider == model_pb2.FILE else f"{schemes[0]}://bucket/prefix"
    scheme, separator, rest = name.partition("://")
    if not separator or scheme not in schemes:
        raise BadModelName(f"model name {name[:200]!r} must look like {form}")
    bucket, _, prefix = rest.rstrip("/").partition("/")
    if provider == model_pb2.FILE:
        if bucket or not prefix:
            raise BadModelName(f"model name {name[:200]!r} must look like {form}")
    elif not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise BadModelName(f"model name {name[:200]!r}: {bucket[:100]!r} is not a bucket; it must look like {form}")
    if prefix and (problem := path_problem(prefix)):
        raise BadModelName(f"model name {name[:200]!r}: {problem}")
    return f"{scheme}://{bucket}/{prefix}" if prefix else f"{scheme}://{bucket}"


def checked_revision(model: ModelName, revision: str) -> str:
    """The revision, checked; "" (none given) is the default one.

    Raises:
        BadModelName: it cannot be one, or the provider has none.
    """
    if model.provider != model_pb2.HUGGING_FACE:
        if revision:
            raise BadModelName(f"{model.provider_name} has no revisions, but {revision[:100]!r} was asked for")
        return ""
    revision = revision or DEFAULT_REVISION
    # git's own rules (git-check-ref-format), as far as they matter for a path; refs/pr/1 is a revision of the hub.
    if (problem := path_problem(revision)) or re.search(r"[\s~^?*\[]|@\{", revision):
        raise BadModelName(
            f"revision {revision[:100]!r} is not a branch, tag or commit: {problem or 'git does not allow it'}"
        )
    return revision


WEIGHT_SUFFIXES = (
    *(".bin", ".safetensors", ".h5", ".msgpack", ".ckpt.index", ".iop", ".gas"),  # the protocol's
    *(".pt", ".pth", ".gguf", ".onnx"),  # ours
)


def is_weight(path: str) -> bool:
    """Whether `ignore_weights` leaves this file out."""
    return path.lower().endswith(WEIGHT_SUFFIXES)
