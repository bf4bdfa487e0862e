"""What a library's exception about an object store means: one of our errors, with bucket, key and cause, no secrets."""

from __future__ import annotations

from mxcore.errors import (
    ObjectCredentials,
    ObjectDenied,
    ObjectMissing,
    ObjectStoreError,
    ObjectTruncated,
    StoreTimeout,
    StoreUnreachable,
    WrongRegion,
)
from mxcore.storage.remote.model_uri import ModelUri
from mxserver.wire.stores import Kind, cause_of

__all__ = ["RangesIgnored", "as_store_error"]


class RangesIgnored(StoreUnreachable):
    """The store answers a range with 200 and not 206, so that nobody knows what those bytes are."""


_KINDS: dict[Kind, type[ObjectStoreError]] = {
    "missing": ObjectMissing,
    "denied": ObjectDenied,
    "credentials": ObjectCredentials,
    "region": WrongRegion,
    "clock": ObjectDenied,
    "slow": StoreTimeout,
    "broken": StoreTimeout,
    "endpoint": StoreUnreachable,
    "ranges": RangesIgnored,
    "replaced": ObjectTruncated,
}


def as_store_error(error: Exception, uri: ModelUri, key: str, doing: str) -> ObjectStoreError:
    """Our error for an exception of obstore's. Programming errors come out as ObjectStoreError with their type."""
    cause = cause_of(error, uri.scheme)
    kind = _KINDS.get(cause.kind, ObjectStoreError)
    return kind(f"{doing} {uri.scheme} bucket {uri.bucket!r}, key {key!r}: {cause}", file=key)
