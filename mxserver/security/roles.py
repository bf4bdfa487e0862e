"""Roles, what each method of the server needs, and who calls."""

from __future__ import annotations

import enum
from contextvars import ContextVar
from dataclasses import dataclass

from mxserver.wire import MxError
from mxserver.wire.credentials import LONGEST_TOKEN_BYTES


class Role(enum.IntEnum):
    """Each role may do what those before it may."""

    READ = 1  # see who has what; take model files that are there
    PUBLISH = 2  # be a worker: publish its own record, have models downloaded
    ADMIN = 3  # delete, pin and validate models


_P2P = "/model_express.p2p.P2pService/"
_MODEL = "/model_express.model.ModelService/"
_CACHE = "/model_express.mx.CacheService/"
_FLEET = "/model_express.mx.FleetService/"

ROLE_OF_METHOD: dict[str, Role] = {
    _P2P + "ListSources": Role.READ,
    _P2P + "GetMetadata": Role.READ,
    _P2P + "PublishMetadata": Role.PUBLISH,
    _P2P + "UpdateStatus": Role.PUBLISH,
    _FLEET + "TakeStorageTurn": Role.PUBLISH,
    _FLEET + "EndStorageTurn": Role.PUBLISH,
    _FLEET + "TellDoubt": Role.PUBLISH,
    _FLEET + "ListDoubts": Role.READ,
    "/model_express.mx.WatchService/WatchSources": Role.READ,
    _MODEL + "ListModelFiles": Role.READ,
    _MODEL + "StreamModelFiles": Role.READ,
    _MODEL + "EnsureModelDownloaded": Role.PUBLISH,
    _MODEL + "DeleteModel": Role.ADMIN,
    _CACHE + "ListModels": Role.READ,
    _CACHE + "PinModel": Role.ADMIN,
    _CACHE + "ValidateModel": Role.ADMIN,
}
"""A method that is missing here needs ADMIN, so that a new method is closed by default."""

OPEN_SERVICES = (
    "/grpc.health.v1.Health/",
    "/model_express.health.HealthService/",
    "/model_express.api.ApiService/",
    "/model_express.mx.Probe/",
)
"""Open to all, because probes have no token. They tell only whether the server works, and its version."""


def required_role(method: str) -> Role | None:
    """The role that a call of this method (`/package.Service/Method`) needs; None: none."""
    if method.startswith(OPEN_SERVICES):
        return None
    return ROLE_OF_METHOD.get(method, Role.ADMIN)


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller whose token or certificate was checked; records belong to `subject`."""

    subject: str
    role: Role


CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current_owner() -> str:
    """Whose records the running call may change; empty where callers are not identified."""
    caller = CALLER.get()
    return caller.subject if caller else ""


def require_role(needed: Role, what: str) -> None:
    """For calls of which one part needs more than their method. Raises AccessError."""
    caller = CALLER.get()
    if caller is not None and caller.role < needed:
        role = caller.role.name.lower()
        raise AccessError(f"{caller.subject} has the role {role}; {what} needs {needed.name.lower()}")


class AccessError(MxError):
    """A call is not allowed. The message is shown to the caller and contains nothing secret."""

    code = "MX_ACCESS"


class Unauthenticated(AccessError):
    """There is no token, or it is not (or no longer) valid."""

    code = "MX_UNAUTHENTICATED"


class AccessUnknown(AccessError):
    """The service that judges tokens does not answer; no call is allowed meanwhile."""

    code = "MX_ACCESS_UNKNOWN"


def bearer_token(authorization: str) -> bytes:
    """The token of `Bearer TOKEN`, as a call's metadata or a request's header has it. Raises Unauthenticated."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated("the call carries no token; set MX_AUTH_TOKEN_PATH to the file that has it")
    token = value.strip().encode()
    if not token or len(token) > LONGEST_TOKEN_BYTES:
        raise Unauthenticated("the token is empty or too long")
    return token
