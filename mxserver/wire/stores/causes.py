"""Why an object store gives no bytes, out of an exception of obstore's: one classification for worker and server.

obstore (0.12) has one class for nearly everything; what the store said is in its text, after that its own state
("Debug source"), which is never shown.
"""

from __future__ import annotations

import os
import re
from typing import Literal, NamedTuple

__all__ = ["Cause", "Kind", "cause_of", "without_secrets"]

Kind = Literal[
    "missing",
    "denied",
    "credentials",
    "region",
    "clock",
    "slow",
    "broken",
    "endpoint",
    "name",
    "ranges",
    "replaced",
    "unknown",
]

_STATUS = re.compile(r"(?:status code: |HTTP error: |\()(\d{3})\b")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_SECRET_NAMES = re.compile(r"(SECRET|TOKEN|PASSWORD|_KEY$|KEY_ID$|CONNECTION_STRING|SAS)", re.IGNORECASE)
_SIGNED = re.compile(r"(X-Amz-[A-Za-z-]+|sig|Signature|AWSAccessKeyId|GoogleAccessId)=[^&\s\"'<>]+|Credential=[^,\s]+")
_LONGEST = 400
_DEBUG = "Debug source"
_METADATA = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")  # where machines ask for credentials

_NOBODY = "no credentials are set, and the machine's metadata service gave none: set those of the store"
_EXPIRED = "the credentials have expired: renew them"
_UNKNOWN = "the store does not know these credentials: check the key and its secret, or the token"
_DENIED = "access is denied: these credentials may not read it"
_REGION = "the bucket lies in another region than {region}: set AWS_REGION to the bucket's"
_CLOCK = "this machine's clock is wrong by more than the store allows: set it (NTP)"
_SLOW = "the store did not answer in time, or is overloaded: it is worth another try"
_BROKEN = "the answer broke off before its end: it is worth another try"
_ENDPOINT = "{endpoint} does not answer as such a store does: check the endpoint"
_NO_NAME = "{endpoint}: there is no such host: check the endpoint, and the name service"
_MISSING = "there is no such bucket or object: check the name"
_NAME = "it has a key that is no path of a file: remove or rename that object"
_RANGES = "{endpoint} does not answer ranges of objects as HTTP says (206)"
_REPLACED = "it was replaced while it was read: begin again"

_Meaning = tuple[Kind, str]

_CODES: dict[_Meaning, str] = {
    ("credentials", _EXPIRED): "ExpiredToken ExpiredTokenException TokenRefreshRequired RequestExpired",
    ("denied", _UNKNOWN): "InvalidToken InvalidAccessKeyId SignatureDoesNotMatch AuthenticationFailed InvalidSecurity",
    ("credentials", _NOBODY): "MissingSecurityHeader MissingAuthenticationToken",
    ("clock", _CLOCK): "RequestTimeTooSkewed AuthFailureClockSkew",
    ("region", _REGION): "PermanentRedirect TemporaryRedirect AuthorizationHeaderMalformed "
    "IllegalLocationConstraintException",
    ("slow", _SLOW): "SlowDown ServiceUnavailable RequestTimeout InternalError Throttling ServerBusy",
    ("missing", _MISSING): "NoSuchBucket NoSuchKey BlobNotFound ContainerNotFound",
    ("denied", _DENIED): "AccessDenied AllAccessDisabled AccountProblem",
}
_BY_CODE = {code: meaning for meaning, codes in _CODES.items() for code in codes.split()}
_BY_STATUS: dict[int, _Meaning] = {
    **dict.fromkeys((401, 403), ("denied", _DENIED)),
    404: ("missing", _MISSING),
    **dict.fromkeys((301, 307, 308), ("region", _REGION)),
    412: ("replaced", _REPLACED),
    **dict.fromkeys((408, 429, 500, 502, 503, 504), ("slow", _SLOW)),
}
_BY_TYPE: dict[str, _Meaning] = {
    "InvalidPathError": ("name", _NAME),
    "PreconditionError": ("replaced", _REPLACED),
    "PermissionDeniedError": ("denied", _DENIED),
    "UnauthenticatedError": ("denied", _DENIED),
    "PermissionError": ("denied", _DENIED),
    "FileNotFoundError": ("missing", _MISSING),
    "NotFoundError": ("missing", _MISSING),
    "TimeoutError": ("slow", _SLOW),
}
_BODY = ("body error", "content-range header not present", "ended early", "unexpected eof")
_SENDING = ("error sending request", "connection refused", "tcp connect", "url", "invalid list response")
# In this order: words in what the library says, words in its state as well, and what they mean.
_BY_WORDS: tuple[tuple[tuple[str, ...], tuple[str, ...], _Meaning], ...] = (
    (("non-partial response",), (), ("ranges", _RANGES)),
    (("redirect without location", "wrong region"), (), ("region", _REGION)),
    (("missing access key", "no credential", "could not find credentials"), (), ("credentials", _NOBODY)),
    (_BODY, ("IncompleteMessage",), ("broken", _BROKEN)),
    (("timed out", "took too long", "connection reset"), ("TimedOut", "ConnectionReset"), ("slow", _SLOW)),
    (("dns error",), ("dns error",), ("endpoint", _NO_NAME)),
    (_SENDING, (), ("endpoint", _ENDPOINT)),
)
_ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}


class Cause(NamedTuple):
    """`text` says what is wrong and what to do; `said` is what the store or the library said, without secrets.

    `may_pass`: trying again can help.
    """

    kind: Kind
    text: str
    said: str
    may_pass: bool

    def __str__(self) -> str:
        return f"{self.text} ({self.said})"


def without_secrets(text: str) -> str:
    """The text in one line, without signatures, and without the value of any variable that holds a credential."""
    text = _SIGNED.sub("…", " ".join(text.partition(_DEBUG)[0].split()))
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) >= 6:
            text = text.replace(value, "…")
    return text[:_LONGEST]


def cause_of(error: BaseException, scheme: str) -> Cause:
    """The cause of an exception of obstore's about a store of that scheme: s3, gs or az (abfss)."""
    kind, text = _kind_of(error)
    region = f"AWS_REGION={os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION') or 'unset'}"
    told = text.format(region=region, endpoint=_endpoint(scheme))
    said = without_secrets(f"{type(error).__name__}: {error}")
    nobody_answered = kind == "endpoint" and "sending request" in said  # it may be starting
    return Cause(kind, told, said, kind in ("slow", "broken") or nobody_answered)


def _kind_of(error: BaseException) -> _Meaning:
    shown, _, state = str(error).partition(_DEBUG)
    if any(place in shown for place in _METADATA):
        return "credentials", _NOBODY
    if (code := _CODE.search(shown)) and code[1] in _BY_CODE:
        return _BY_CODE[code[1]]
    status = int(found[1]) if (found := _STATUS.search(shown)) else 0
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if type(error).__name__ in _BY_TYPE:
        return _BY_TYPE[type(error).__name__]
    low = shown.lower()
    for words, states, meaning in _BY_WORDS:
        if any(word in low for word in words) or any(word in state for word in states):
            return meaning
    return ("endpoint", _ENDPOINT) if status else ("unknown", "it failed")


def _endpoint(scheme: str) -> str:
    name = _ENDPOINTS.get(scheme, _ENDPOINTS["az"])
    value = os.environ.get(name, "")
    return f"{name}={re.sub(r'//[^/@]*@', '//…@', value)}" if value else f"the default endpoint of {scheme}"
