"""What a library's exception about an object store means: one of our errors, with bucket, key and cause, no secrets."""

from __future__ import annotations

import os
import re

from mxcore.errors import (
    ObjectDenied,
    ObjectMissing,
    ObjectStoreError,
    ObjectTruncated,
    StoreTimeout,
    StoreUnreachable,
    WrongRegion,
)
from mxcore.storage.remote.model_uri import ModelUri

__all__ = ["RangesIgnored", "as_store_error", "without_secrets"]

_STATUS = re.compile(r"(?:status code: |HTTP error: |\()(\d{3})\b")
_SECRET_NAMES = re.compile(r"(SECRET|TOKEN|PASSWORD|_KEY$|KEY_ID$|CONNECTION_STRING|SAS)", re.IGNORECASE)
_SIGNED = re.compile(r"(X-Amz-[A-Za-z-]+|sig|Signature|AWSAccessKeyId|GoogleAccessId)=[^&\s\"'<>]+|Credential=[^,\s]+")
_LONGEST = 400

_REGION = ("permanentredirect", "authorizationheadermalformed", "wrong region", "illegallocationconstraint", "(301)")
_DENIED = (
    *("accessdenied", "signaturedoesnotmatch", "invalidaccesskeyid", "expiredtoken", "unauthenticated", "forbidden"),
    *("missing access key", "no credential", "missingsecurityheader", "authenticationfailed", "invalidtoken"),
)
_MISSING = ("nosuchbucket", "nosuchkey", "not found", "blobnotfound", "containernotfound")
_TIMEOUT = ("timed out", "timeout", "operation took too long", "slowdown", "serviceunavailable", "connection reset")
_ENDPOINT = (
    *("error sending request", "dns error", "connection refused", "connect error", "tcp connect", "unsupported url"),
    *(
        "invalid url",
        "relative url",
        "invalid list response",
        "unexpected eof while",
        "urlscheme is not",
        "not allowed",
    ),
)


class RangesIgnored(StoreUnreachable):
    """The store answers a range with 200 and not 206, so that nobody knows what those bytes are."""


def without_secrets(text: str) -> str:
    """The text in one line, without signatures, and without the value of any variable that holds a credential."""
    text = _SIGNED.sub("…", " ".join(text.split()))
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) >= 6:
            text = text.replace(value, "…")
    return text[:_LONGEST]


def as_store_error(error: Exception, uri: ModelUri, key: str, doing: str) -> ObjectStoreError:
    """Our error for an exception of obstore's. Programming errors come out as ObjectStoreError with their type."""
    where = f"{uri.scheme} bucket {uri.bucket!r}, key {key!r}"
    said = without_secrets(f"{type(error).__name__}: {error}")
    low = str(error).lower()
    found = _STATUS.search(str(error))
    status = int(found[1]) if found else 0

    def made(kind: type[ObjectStoreError], cause: str) -> ObjectStoreError:
        return kind(f"{doing} {where}: {cause} ({said})", file=key)

    if "non-partial response" in low:
        return made(RangesIgnored, f"{_endpoint(uri)} does not answer ranges of objects as HTTP says (206)")
    if type(error).__name__ == "PreconditionError" or status == 412:
        return made(ObjectTruncated, "it was replaced while it was read")
    if any(word in low for word in _REGION):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "unset"
        return made(WrongRegion, f"the bucket lies in another region than AWS_REGION={region}")
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError", "PermissionError") or (
        status in (401, 403) or any(word in low for word in _DENIED)
    ):
        return made(ObjectDenied, "access is denied: check the credentials in the worker's environment")
    if isinstance(error, FileNotFoundError) or status == 404 or any(word in low for word in _MISSING):
        return made(ObjectMissing, "there is no such bucket or object")
    if any(word in low for word in _TIMEOUT) or status in (429, 500, 502, 503, 504):
        return made(StoreTimeout, "the store did not answer in time, or is overloaded")
    if any(word in low for word in _ENDPOINT) or status:
        return made(StoreUnreachable, f"{_endpoint(uri)} does not answer as such a store does")
    return made(ObjectStoreError, "it failed")


def _endpoint(uri: ModelUri) -> str:
    names = {"s3": ("AWS_ENDPOINT_URL",), "gs": ("GOOGLE_BASE_URL",), "az": ("AZURE_STORAGE_ENDPOINT",)}[uri.scheme]
    value = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return f"{names[0]}={re.sub(r'//[^/@]*@', '//…@', value)}" if value else f"the default endpoint of {uri.scheme}"
