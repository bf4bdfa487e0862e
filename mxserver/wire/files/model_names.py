"""What a model may be called: a repository of the hub, or the URL of a folder or of a store's prefix."""

from __future__ import annotations

import re
from typing import TypeAlias

from mxserver.wire.proto import model_pb2
from mxserver.wire.relative_path import path_problem

Provider: TypeAlias = model_pb2.ModelProvider.ValueType

SCHEMES: dict[Provider, tuple[str, ...]] = {
    model_pb2.S3: ("s3",),
    model_pb2.GCS: ("gs",),
    model_pb2.AZURE: ("az", "abfss"),
    model_pb2.FILE: ("file",),
}
"""Providers whose models are named by URL; the rest are repositories of the Hugging Face Hub."""

_BY_SCHEME = {scheme: provider for provider, schemes in SCHEMES.items() for scheme in schemes}
_REPO_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_BUCKET = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@-]{0,251}[A-Za-z0-9])?")


def provider_of(name: str) -> Provider:
    """Which provider a model's name belongs to: that of its URL's scheme, or the hub."""
    scheme, separator, _ = name.partition("://")
    return _BY_SCHEME.get(scheme, model_pb2.HUGGING_FACE) if separator else model_pb2.HUGGING_FACE


def name_problem(provider: Provider, name: str) -> str:
    """Why a provider can have no model of that name; empty where it can. The provider is the hub or in SCHEMES."""
    return _repository_problem(name) if provider == model_pb2.HUGGING_FACE else _url_problem(provider, name)


def _repository_problem(name: str) -> str:
    parts = name.split("/")
    if len(parts) <= 2 and all(map(_REPO_PART.fullmatch, parts)) and "--" not in name and ".." not in name:
        return ""
    return (
        f"model name {name[:200]!r} is not a repository of the hub: it must be NAME or ORGANISATION/NAME of "
        "letters, digits, '.', '_' and '-', without '--' and '..'"
    )


def _url_problem(provider: Provider, name: str) -> str:
    schemes = SCHEMES[provider]
    form = f"{schemes[0]}:///folder" if provider == model_pb2.FILE else f"{schemes[0]}://bucket/prefix"
    scheme, separator, rest = name.partition("://")
    bucket, _, prefix = rest.rstrip("/").partition("/")
    shaped = bool(separator) and scheme in schemes
    if not shaped or (provider == model_pb2.FILE and (bucket or not prefix)):
        return f"model name {name[:200]!r} must look like {form}"
    if provider != model_pb2.FILE and (not _BUCKET.fullmatch(bucket) or ".." in bucket):
        return f"model name {name[:200]!r}: {bucket[:100]!r} is not a bucket; it must look like {form}"
    if prefix and (problem := path_problem(prefix)):
        return f"model name {name[:200]!r}: {problem}"
    return ""
