"""What callers may have downloaded."""

from __future__ import annotations

import pytest

from mxserver.models import model_name
from mxserver.models.errors import SourceNotAllowed
from mxserver.models.sources import AllowedSources
from mxserver.settings import load_settings
from mxserver.wire import SettingError
from mxserver.wire.proto import model_pb2

PROVIDERS = {"s3": model_pb2.S3, "gs": model_pb2.GCS, "az": model_pb2.AZURE, "file": model_pb2.FILE}


def is_allowed(name: str, *allowed: str) -> bool:
    provider = PROVIDERS.get(name.partition("://")[0], model_pb2.HUGGING_FACE)
    settings = load_settings({"model_sources": ",".join(allowed)})
    try:
        AllowedSources(settings.model_sources).require(model_name(provider, name))
    except SourceNotAllowed as error:
        return "MX_MODEL_SOURCES" not in str(error)
    return True


@pytest.mark.parametrize(
    ("name", "allowed", "is_right"),
    [
        ("org/name", (), True),
        ("s3://bucket/prefix", (), True),
        ("org/name", ("org/*",), True),
        ("organisation/name", ("org/*",), False),
        ("org/name", ("org/name",), True),
        ("org/name-2", ("org/name",), False),
        ("gpt2", ("*",), True),
        ("org/name", ("s3://bucket",), False),
        ("s3://bucket/a/b", ("s3://bucket",), True),
        ("s3://bucket/a/b", ("s3://bucket/a/",), True),
        ("s3://bucket/ab", ("s3://bucket/a",), False),
        ("s3://bucket-2/a", ("s3://bucket",), False),
        ("gs://bucket/a", ("s3://bucket", "*"), False),
        ("s3://bucket/a", ("*",), False),
        ("az://c@mine/m", (), True),
        ("az://c/m", (), True),
        ("az://c@theirs/m", (), False),
        ("az://c@theirs/m", ("az://c@theirs",), True),
        ("az://c@theirs.blob.example/m", ("*",), False),
        ("file:///a", ("*",), True),
    ],
)
def test_sources(monkeypatch: pytest.MonkeyPatch, name: str, allowed: tuple[str, ...], is_right: bool) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "mine")
    assert is_allowed(name, *allowed) is is_right


@pytest.mark.parametrize("wrong", ["http://bucket", "s3://*", "a b", "org/*/x"])
def test_what_is_no_source_is_refused(wrong: str) -> None:
    with pytest.raises(SettingError, match="--model-sources"):
        load_settings({"model_sources": wrong})
