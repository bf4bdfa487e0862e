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
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from mxserver.security.roles import AccessUnknown, Caller, Unauthenticated
from mxserver.security.service_accounts import Subjects
from mxserver.wire import SettingError
from mxserver.wire.credentials import FollowedFiles

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


def api_server(environ: Mapping[str, str]) -> str:
    """https://host:port of the API server: as Kubernetes tells each container, else by its name in every cluster."""
    host = environ.get("KUBERNETES_SERVICE_HOST", "").strip()
    if not host:
        return "https://kubernetes.default.svc"
    port = environ.get("KUBERNETES_SERVICE_PORT", "").strip() or "443"
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


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
        self._own_token_file = FollowedFiles(self._own_token)
        self._issuer: str | None = None
        context: ssl.SSLContext | bool = True
        if api_url.startswith("https://"):
            ca_file = account_folder / "ca.crt"
            try:
                context = ssl.create_default_context(cafile=str(ca_file) if ca_file.exists() else None)
            except (OSError, ssl.SSLError) as error:
                raise SettingError(f"the CA of Kubernetes, {ca_file}, cannot be used: {error}") from error
        # Connections are kept: a handshake for each review would cost more than the review. No proxy of the environment
        # stands before the API server, and it leads nowhere else.
        self._client = httpx.Client(
            verify=context,
            timeout=ANSWER_SECONDS,
            limits=httpx.Limits(max_connections=REVIEWS_AT_ONCE, max_keepalive_connections=REVIEWS_AT_ONCE),
            trust_env=False,
        )
        weakref.finalize(self, self._client.close)
        self._lock = threading.Lock()
        self._good: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._bad: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._asking: dict[bytes, _Asked] = {}
        self._reviews = threading.BoundedSemaphore(REVIEWS_AT_ONCE)
        self._places = threading.BoundedSemaphore(REVIEWS_AT_ONCE + REVIEWS_WAITING)

    def authenticate(self, token: bytes) -> Caller:
        """Whose token this is. Raises Unauthenticated, and AccessUnknown when the API server does not answer."""
        digest = hashlib.sha256(token).digest()
        _require_shape(token, self._own_issuer(), self._audiences)
        verdict = self._remembered(digest) or self._ask_once(digest, token)
        if not verdict.subject:
            raise Unauthenticated(verdict.reason)
        return Caller(verdict.subject, self._subjects.role_of(verdict.username))

    def require_plausible(self, token: bytes) -> None:
        """Raises Unauthenticated for what cannot be a token of this cluster. Asks nobody."""
        _require_shape(token, self._own_issuer(), self._audiences)

    def _own_issuer(self) -> str | None:
        """The issuer of the server's own token, which is that of all service accounts; None if it cannot be told."""
        if not self._own_token_file.changed():
            return self._issuer
        self._issuer = None
        try:
            issuer = _claims(self._own_token.read_bytes().strip())["iss"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        self._issuer = issuer if isinstance(issuer, str) else None
        return self._issuer

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
        except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _LOG.error("the API server did not judge a token url=%s reason=%s", self._url, error)
            raise AccessUnknown(
                "tokens cannot be judged at the moment: Kubernetes' API server does not answer"
            ) from error
        finally:
            self._places.release()

    def _post(self, body: bytes) -> Any:
        headers = {
            "Authorization": f"Bearer {self._own_token.read_text().strip()}",  # rotates: read each time
            "Content-Type": "application/json",
            "Accept": "application/json",
        }
        with self._client.stream("POST", self._url, content=body, headers=headers) as answer:
            answer.raise_for_status()
            content = b""
            for part in answer.iter_bytes():
                content += part
                if len(content) > LARGEST_ANSWER_BYTES:
                    raise ValueError(f"the answer has more than {LARGEST_ANSWER_BYTES} bytes")
            return json.loads(content)

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


def _require_shape(token: bytes, issuer: str | None, audiences: tuple[str, ...]) -> None:
    """Raises Unauthenticated for what cannot be a token of a service account of this cluster: they are JWTs (RFC 7519)
    with its issuer, an audience and an end. What is said there is believed only where it refuses.
    """
    try:
        claims = _claims(token)
        if not isinstance(claims["iss"], str):
            raise ValueError("its issuer is no name")
        late = float(claims.get("exp", "inf")) <= time.time()
        meant = claims.get("aud")
        meant = {meant} if isinstance(meant, str) else set(meant) if isinstance(meant, list) else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Unauthenticated("the token is not one of Kubernetes: it is no JWT with an issuer") from error
    if late:
        raise Unauthenticated("the token has expired")
    if issuer is not None and claims["iss"] != issuer:
        raise Unauthenticated(f"the token is not one of this cluster, whose issuer is {issuer}")
    if audiences and meant is not None and not meant & set(audiences):
        raise Unauthenticated(f"the token is not for the audience {' or '.join(audiences)}")


def _claims(token: bytes) -> dict[str, Any]:
    """What a JWT says of itself; its signature is not checked. Raises ValueError."""
    header, claims, signature = token.split(b".")
    fields = [json.loads(base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))) for part in (header, claims)]
    if not signature or not all(isinstance(one, dict) for one in fields):
        raise ValueError("it is no signed JWT")
    found: dict[str, Any] = fields[1]
    return found
