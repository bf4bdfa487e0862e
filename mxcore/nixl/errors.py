"""What NIXL's statuses mean, as errors that say what failed with whom."""

from __future__ import annotations

from mxcore.errors import NixlError, NixlMissing, PeerLost

__all__ = ["failure", "no_plugin", "not_started", "peer_lost"]

_STATUS_NAMES = {-1: "invalid parameter", -2: "backend error", -3: "invalid state", -4: "exception"}


def failure(call: str, status: int, agent: str, detail: str = "") -> NixlError:
    """A call to NIXL that failed; `detail` says what it may come from."""
    return NixlError(f"NIXL agent {agent!r}: {call} failed with status {_named(status)}{detail}")


def peer_lost(call: str, status: int, agent: str, operation: str, remote_agent: str) -> PeerLost:
    """A transfer that failed."""
    return PeerLost(
        f"NIXL agent {agent!r}: {call} a {operation} with {remote_agent!r} failed with status {_named(status)}: "
        "the other side, or the way to it, is gone"
    )


def no_plugin(library: str, backend: str, status: int) -> NixlMissing:
    """The library is there and the backend's plugin is not."""
    return NixlMissing(
        f"NIXL at {library} has no usable plugin {backend!r} (status {status}); "
        "see its log above for what could not be loaded"
    )


def not_started(backend: str, status: int) -> NixlMissing:
    """The backend's plugin is there and does not start."""
    return NixlMissing(
        f"NIXL's backend {backend!r} does not start (status {status}); with UCX: check UCX_TLS and "
        "UCX_NET_DEVICES, at least one transport must be able to report a peer's failure (tcp, rc)"
    )


def _named(status: int) -> str:
    return f"{status} ({_STATUS_NAMES.get(status, 'unknown')})"
