"""Names of models: providers, names and revisions, checked before they are used."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from mxserver.models.errors import BadModelName
from mxserver.wire import path_problem
from mxserver.wire.files import SCHEMES, Provider, name_problem
from mxserver.wire.proto import model_pb2

DEFAULT_REVISION = "main"

_COMMIT = re.compile(r"[0-9a-f]{40}")


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
    known = next((known for known in (model_pb2.HUGGING_FACE, *SCHEMES) if known == provider), None)
    if known is None:
        label = "NGC" if provider == model_pb2.NGC else f"number {provider}"
        raise BadModelName(f"provider {label} is not served; there are HUGGING_FACE, GCS, S3, AZURE and FILE")
    if problem := name_problem(known, name):
        raise BadModelName(problem)
    return ModelName(known, name if known == model_pb2.HUGGING_FACE else name.rstrip("/"))


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
