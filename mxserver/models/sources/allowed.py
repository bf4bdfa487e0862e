"""Which models callers may have downloaded: a worker's token must not read all that the server's credentials reach."""

from __future__ import annotations

import os

from mxserver.models.errors import SourceNotAllowed
from mxserver.models.names import ModelName
from mxserver.wire.files import SCHEMES
from mxserver.wire.proto import model_pb2

SETTING = "MX_MODEL_SOURCES"

_ACCOUNT_NAMES = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT")


class AllowedSources:
    """Buckets, prefixes of them, accounts, and repositories of the hub; without a list all, but for accounts of Azure
    that are not the server's own. Folders (`file://`) have a list of their own. Thread-safe.
    """

    def __init__(self, allowed: tuple[str, ...] = ()) -> None:
        """Each `org/*`, `org/name`, `*` (the whole hub), or `s3://bucket` with a prefix or without."""
        self._urls = tuple(one.rstrip("/") for one in allowed if "://" in one)
        self._repositories = tuple(one for one in allowed if "://" not in one)
        self._all = not allowed

    def require(self, model: ModelName) -> None:
        """Raises SourceNotAllowed."""
        if model.provider == model_pb2.FILE:
            return
        if not (self._has(model) or self._all):
            raise SourceNotAllowed(f"{model.name} is not among the sources of this server; add it to {SETTING}")
        account = model.name.partition("://")[2].partition("/")[0].partition("@")[2].partition(".")[0]
        own = {os.environ.get(name) for name in _ACCOUNT_NAMES}
        if model.provider == model_pb2.AZURE and account and account not in own and not self._has(model):
            # The server's credentials would be sent to whatever account a caller names.
            raise SourceNotAllowed(
                f"{model.name} is in another account than the server's, AZURE_STORAGE_ACCOUNT_NAME; add it to {SETTING}"
            )

    def _has(self, model: ModelName) -> bool:
        if model.provider in SCHEMES:
            return any(model.name == url or model.name.startswith(f"{url}/") for url in self._urls)
        return any(
            name in ("*", model.name) or (name.endswith("/*") and model.name.startswith(name[:-1]))
            for name in self._repositories
        )
