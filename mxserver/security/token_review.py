"""Tokens of Kubernetes, judged by its API server: TokenReview, authentication.k8s.io/v1.

https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-review-v1/

The server's own service account needs the ClusterRole system:auth-delegator. A token's account gets its role by
mxserver.security.service_accounts. Records belong to the pod that a token is bound to, or to its service account.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxserver.security.roles import AccessUnknown, Caller, Unauthenticated
from mxserver.security.service_accounts import Subjects
from mxserver.wire import SettingError

_LOG = logging.getLogger(__name__)

ACCOUNT_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PATH = "/apis/authentication.k8s.io/v1/tokenreviews"

ANSWER_SECONDS = 5.0
GOOD_SECONDS = 60.0  # unless set; a revoked token stays valid this long
BAD_SECONDS = 10.0
KNOWN_TOKENS = 20_000
REFUSED_TOKENS = 2_000  # kept apart, so that refused tokens push no good one out
REVIEWS_AT_ONCE = 8
REVIEWS_WAITING = 16  # calls that wait for one of those, each in a thread
LARGEST_ANSWER_BYTES = 1024 * 1024

_POD_NAME = "authentication.kubernetes.io/pod-name"


@dataclass(frozen=True)
class _Verdict:
    until: float  # monotonic seconds
    subject: str  # empty: not good
    username: str
    reason: str


@dataclass
class _Asked:
    """A question about one token, and how many calls want its answer."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    callers: int = 0


class TokenReviews:
    """Asks the API server, and remembers its answers for a while. Thread-safe.

    One call at a time asks about one token; other calls with the same token wait for its answer. What cannot be a token
    of Kubernetes is refused without a question, at most REVIEWS_AT_ONCE questions are open and REVIEWS_WAITING calls
    wait for them: the next is refused at once, so that unknown tokens hold no more threads than these.
    """

    def __init__(
        self,
        subjects: Subjects,
        api_url: str,
        *,
        audiences: Sequence[str] = (),
        account_folder: Path = ACCOUNT_FOLDER,
        good_seconds: float = GOOD_SECONDS,
    ) -> None:
        """`api_url` is https://host:port of the API server; tokens must be for one of `audiences`, if there are any.

        Raises SettingError.
        """
        self._subjects = subjects
        self._url = api_url.rstrip("/") + PATH
        self._audiences = tuple(audiences)
        self._good_seconds = good_seconds
        self._own_token = account_folder / "token"
        self._context: ssl.SSLContext | None = None
        if api_url.startswith("https://"):
            ca_file = account_folder / "ca.crt"
            try:
                self._context = ssl.create_default_context(cafile=str(ca_file) if ca_file.exists() else None)
            except (OSError, ssl.SSLError) as error:
                raise SettingError(f"the CA of Kubernetes, {ca_file}, cannot be used: {error}") from error
        self._lock = threading.Lock()
        self._good: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._bad: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._asking: dict[bytes, _Asked] = {}
        self._reviews = threading.BoundedSemaphore(REVIEWS_AT_ONCE)
        self._places = threading.BoundedSemaphore(REVIEWS_AT_ONCE + REVIEWS_WAITING)

    def authenticate(self, token: bytes) -> Caller:
        """Whose token this is. Raises Unauthenticated, and AccessUnknown when the API server does not answer."""
        _require_shape(token)
        digest = hashlib.sha256(token).digest()
        verdict = self._remembered(digest) or self._ask_once(digest, token)
        if not verdict.subject:
            raise Unauthenticated(verdict.reason)
        return Caller(verdict.subject, self._subjects.role_of(verdict.username))

    def _remembered(self, digest: bytes) -> _Verdict | None:
        with self._lock:
            verdict = self._good.get(digest) or self._bad.get(digest)
            return verdict if verdict is not None and time.monotonic() < verdict.until else None

    def _ask_once(self, digest: bytes, token: bytes) -> _Verdict:
        with self._lock:
            asked = self._asking.setdefault(digest, _Asked())
            asked.callers += 1
        try:
            with asked.lock:
                verdict = self._remembered(digest)
                if verdict is None:
                    verdict = self._ask(token)
                    self._remember(digest, verdict)
        finally:
            with self._lock:
                asked.callers -= 1
                if not asked.callers:
                    del self._asking[digest]
        return verdict

    def _remember(self, digest: bytes, verdict: _Verdict) -> None:
        known, most = (self._good, KNOWN_TOKENS) if verdict.subject else (self._bad, REFUSED_TOKENS)
        with self._lock:
            for verdicts in (self._good, self._bad):
                verdicts.pop(digest, None)
            known[digest] = verdict
            while len(known) > most:
                known.popitem(last=False)

    def _ask(self, token: bytes) -> _Verdict:
        spec: dict[str, Any] = {"token": token.decode("ascii", "replace")}
        if self._audiences:
            spec["audiences"] = list(self._audiences)
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        if not self._places.acquire(blocking=False):
            raise AccessUnknown(
                f"the token cannot be judged at the moment: {REVIEWS_AT_ONCE} are being judged and {REVIEWS_WAITING} "
                "wait, which is the limit; try again"
            )
        try:
            with self._reviews:
                status = self._post(json.dumps(body).encode())["status"]
            return self._verdict(status)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _LOG.error("the API server did not judge a token url=%s reason=%s", self._url, error)
            raise AccessUnknown(
                "tokens cannot be judged at the moment: Kubernetes' API server does not answer"
            ) from error
        finally:
            self._places.release()

    def _post(self, body: bytes) -> Any:
        request = urllib.request.Request(  # noqa: S310 - the URL is a setting's, not a caller's
            self._url,
            data=body,
            headers={
                "Authorization": f"Bearer {self._own_token.read_text().strip()}",  # rotates: read each time
                "Content-Type": "application/json",
                "Accept": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS, context=self._context) as answer:  # noqa: S310
            return json.loads(answer.read(LARGEST_ANSWER_BYTES))

    def _verdict(self, status: dict[str, Any]) -> _Verdict:
        now = time.monotonic()
        if status.get("authenticated") is not True:
            return _Verdict(now + BAD_SECONDS, "", "", "Kubernetes does not know the token")
        if self._audiences and not set(self._audiences) & set(status.get("audiences") or []):
            return _Verdict(
                now + BAD_SECONDS, "", "", f"the token is not for the audience {' or '.join(self._audiences)}"
            )
        user = status["user"]
        username = user["username"]
        if not isinstance(username, str) or not username:
            raise ValueError("the answer names no user")
        pods = (user.get("extra") or {}).get(_POD_NAME) or [""]
        subject = f"{username}/{pods[0]}" if pods[0] else username
        return _Verdict(now + self._good_seconds, subject, username, "")


def _require_shape(token: bytes) -> None:
    """Raises Unauthenticated for what cannot be a token of a service account: they are JWTs (RFC 7519) with an issuer
    and an end. What is said there is believed only where it refuses.
    """
    try:
        header, claims, signature = token.split(b".")
        fields = [json.loads(base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))) for part in (header, claims)]
        if not signature or not all(isinstance(one, dict) for one in fields) or not isinstance(fields[1]["iss"], str):
            raise ValueError("it has no signature or no issuer")
        late = float(fields[1].get("exp", "inf")) <= time.time()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Unauthenticated("the token is not one of Kubernetes: it is no JWT with an issuer") from error
    if late:
        raise Unauthenticated("the token has expired")
