"""MX_MODEL_URI: what it may be, and what is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from mxserver.wire import SettingError, install_command

__all__ = ["EXTRAS", "OBJECT_SCHEMES", "ModelUri", "missing_packages", "parse_model_uri"]

OBJECT_SCHEMES = ("s3", "gs", "az")
EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure"}
"""The extra of our package for each kind of store."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,251}")
_STREAMER = ("runai_model_streamer", "tenacity")
_BACKENDS = {"s3": "runai_model_streamer_s3", "gs": "runai_model_streamer_gcs", "az": "runai_model_streamer_azure"}


class ModelUri(NamedTuple):
    """A folder with a model: below a prefix of a bucket, or (scheme "file") on this machine."""

    scheme: str
    bucket: str
    prefix: str  # without slashes at its ends; of a local folder its path
    text: str  # for messages: as it was given, and never with credentials, which it may not have

    @property
    def is_local(self) -> bool:
        return self.scheme == "file"

    @property
    def folder(self) -> Path:
        """Of a local one."""
        return Path(self.prefix)


def parse_model_uri(text: str, what: str = "MX_MODEL_URI") -> ModelUri:
    """`s3://BUCKET/PREFIX`, `gs://…`, `az://CONTAINER/PREFIX`, `file:///FOLDER` or an absolute path.

    `what` names it in messages. Raises SettingError, which names the rule; a URI with a user or a password is refused
    without repeating it.
    """
    if "://" not in text:
        if not text.startswith("/"):
            raise SettingError(f"{what}={text!r} is neither a URI nor an absolute path")
        return ModelUri("file", "", str(Path(text)), text)
    parts = urlsplit(text)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise SettingError(
            f"{what} may have no user, password, query or fragment ({parts.scheme}://…): credentials go into the "
            "store's own variables, such as AWS_ACCESS_KEY_ID"
        )
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise SettingError(f"{what}={text!r} must look like file:///folder")
        return ModelUri("file", "", unquote(parts.path), text)
    if parts.scheme not in OBJECT_SCHEMES:
        raise SettingError(f"{what}={text!r}: there are s3://, gs://, az://, file:// and absolute paths")
    prefix = parts.path.strip("/")
    if not _BUCKET.fullmatch(parts.netloc) or ".." in prefix.split("/"):
        raise SettingError(f"{what}={text!r} must look like {parts.scheme}://bucket/prefix")
    return ModelUri(parts.scheme, parts.netloc, prefix, text.rstrip("/"))


def missing_packages(uri: ModelUri, *, streamer: bool = False) -> str:
    """What has to be installed to read from there, as a sentence; "" when all is. `streamer`: by Run:ai's streamer."""
    if uri.is_local:
        return ""
    wanted = ("obstore", *_STREAMER, _BACKENDS[uri.scheme]) if streamer else ("obstore",)
    absent = [name for name in wanted if importlib.util.find_spec(name) is None]
    if not absent:
        return ""
    install = install_command(EXTRAS[uri.scheme])
    return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed: {install}"
