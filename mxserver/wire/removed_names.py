"""Names that were settings in development versions: nobody can choose them better than the code, or another name says
the same. Who still sets one is told what to do instead."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Removed(NamedTuple):
    """A name, who read it, and what replaced it."""

    name: str
    reader: Literal["server", "worker", "build"]
    instead: str


REMOVED: tuple[Removed, ...] = (
    Removed("MX_AUTH_AUDIENCE", "server", "set MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES"),
    Removed("MX_CONFIG_FILE", "server", "name the file with --config"),
    Removed("MX_KUBERNETES_API", "server", "Kubernetes says in KUBERNETES_SERVICE_HOST where its API server is"),
    Removed("MX_KUBERNETES_ACCOUNT_PATH", "server", "Kubernetes mounts that folder in one place, which is looked at"),
    Removed("MX_LOG_FORMAT", "server", "set MODEL_EXPRESS_LOG_FORMAT"),
    Removed("MX_SERVER_KEEPALIVE_SECS", "server", "set silence_seconds=NUMBER in MX_SERVER_LIMITS"),
    Removed("MX_SERVER_MAX_CALLS", "server", "set calls=NUMBER in MX_SERVER_LIMITS"),
    Removed("MX_SERVER_MAX_MESSAGE_BYTES", "server", "set publish_bytes=NUMBER in MX_SERVER_LIMITS"),
    Removed("MX_SERVER_MAX_STREAMS", "server", "set streams_per_client=NUMBER in MX_SERVER_LIMITS"),
    Removed("MX_OBJECT_CONNECTIONS", "worker", "16 connections are used; more made no load faster"),
    Removed("MX_OBJECT_READER", "worker", "obstore reads, and Run:ai's streamer where a store answers no ranges"),
    Removed("MX_OBJECT_TIMEOUT_SECS", "worker", "a request is begun again after 30 s of silence"),
    Removed("MX_SAME_HOST_THREADS", "worker", "one thread a core reads, at most four"),
    Removed("MX_STORAGE_READER", "worker", "set MX_READ_MODE, where engine leaves reading to the engine's own loader"),
    Removed("MX_TCP_CONNECTIONS", "worker", "one connection for every two cores is used, at most four"),
    Removed("MX_TOPOLOGY", "worker", "set MX_P2P_TOPOLOGY, in any of the forms that this one had"),
    Removed("MX_TOPOLOGY_REQUIRED", "worker", "set MX_P2P_TOPOLOGY_DOMAIN"),
    Removed("MX_CFLAGS", "build", "set CFLAGS, as for every package"),
    Removed("MX_LIMITED_API", "build", "one build of the stable ABI serves all Pythons that are supported"),
)
