"""All environment names of server and worker, and what to do with unknown names.

The one table: settings read it, docs/reference/settings.md is made from it, and every program warns about unknown names
that look like ours. Nothing here reads the environment itself; it works on the mapping that it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from mxserver.wire.nearest_name import nearest
from mxserver.wire.removed_names import REMOVED
from mxserver.wire.unused_names import UNUSED, is_unused

Reader = Literal["server", "worker", "both", "plugin"]

PREFIXES = ("MX_", "MODEL_EXPRESS_")


class Variable(NamedTuple):
    """One environment name; of the server's settings also the flag with what it takes, and the default in words."""

    name: str
    reader: Reader
    meaning: str
    flag: str = ""
    default: str = ""


VARIABLES: tuple[Variable, ...] = (
    # The server's.
    Variable(
        "MODEL_EXPRESS_SERVER_PORT",
        "server",
        "port that the server listens on; 0 takes a free one",
        "--port PORT",
        "8001",
    ),
    Variable(
        "MX_SERVER_FILES_PORT",
        "server",
        "port for the bytes of cached files, by HTTP ranges; 0 takes a free one; off: they come over gRPC alone",
        "--files-port PORT|off",
        "8002",
    ),
    Variable("MODEL_EXPRESS_SERVER_HOST", "server", "address that the server listens on", "--host ADDRESS", "0.0.0.0"),  # noqa: S104
    Variable(
        "MODEL_EXPRESS_SERVER_METRICS_PORT",
        "server",
        "port of probes, metrics and the status page; off: none. 0 takes a free one, in the environment it is off",
        "--metrics-port PORT|off",
        "9401",
    ),
    Variable(
        "MX_SERVER_METRICS_TLS",
        "server",
        "auto: that port takes TLS where the server has a certificate; off: never",
        "--metrics-tls auto|off",
        "auto",
    ),
    Variable(
        "MODEL_EXPRESS_LOG_LEVEL",
        "server",
        "least severe level that is logged",
        "--log-level debug|info|warning|error",
        "info",
    ),
    Variable(
        "MX_METADATA_BACKEND",
        "server",
        "where the server keeps its state: sqlite, redis or memory",
        "--store sqlite|redis|memory",
        "sqlite",
    ),
    Variable(
        "MX_STORE_PATH", "server", "the SQLite file", "--store-path FILE", "mxserver/state.sqlite3 in ~/.local/state"
    ),
    Variable(
        "REDIS_URL",
        "server",
        "Redis, for the store redis: redis://, rediss:// (TLS) or unix://; wins over the host",
        "--redis-url URL",
        "none",
    ),
    Variable("MX_REDIS_HOST", "server", "host of Redis, for the store redis", "--redis-host HOST", "localhost"),
    Variable("MX_REDIS_PORT", "server", "port of Redis, for the store redis", "--redis-port PORT", "6379"),
    Variable(
        "MODEL_EXPRESS_LOG_FORMAT",
        "server",
        "how the log is written: text, or json with an object a line; pretty, compact and full are text",
        "--log-format text|json",
        "text",
    ),
    Variable("MX_TRACES", "server", "where OpenTelemetry traces go: off or otlp", "--traces off|otlp", "off"),
    Variable(
        "MX_AUTH",
        "server",
        "how callers are told apart: off, file (tokens) or kubernetes (TokenReview)",
        "--auth off|file|kubernetes",
        "off",
    ),
    Variable(
        "MX_AUTH_FILE",
        "server",
        "TOML file with the tokens, or Kubernetes subjects, and their roles",
        "--auth-file FILE",
        "none",
    ),
    Variable(
        "MODEL_EXPRESS_SECURITY_MODE",
        "server",
        "enforce: as MX_AUTH=kubernetes, and needs the accounts and audiences that follow; off: as MX_AUTH=off",
    ),
    Variable(
        "MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS",
        "server",
        "service accounts that alone may call, such as models:vllm; their role is publish, or the access file's",
        "--auth-accounts NAMES",
        "those of the access file",
    ),
    Variable(
        "MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES",
        "server",
        "audiences, one of which tokens of Kubernetes must be for",
        "--auth-audience NAMES",
        "the API server's own",
    ),
    Variable(
        "MODEL_EXPRESS_SECURITY_CACHE_TTL_SECS",
        "server",
        "how long a token of Kubernetes stays good without asking again: so long may a revoked one work",
        "--auth-cache SECONDS",
        "60",
    ),
    Variable(
        "MX_SERVER_LIMITS",
        "server",
        "other limits than the default ones of the table below, as NAME=NUMBER",
        "--limits NAME=NUMBER,...",
        "as in docs/reference/settings.md",
    ),
    Variable(
        "MX_SERVER_METRICS_HOSTS",
        "server",
        "names under which the page may be asked for without a token, beside addresses and names of the cluster",
        "--metrics-hosts NAMES",
        "those of the cluster",
    ),
    Variable(
        "MX_SERVER_NOT_READY_SECS",
        "server",
        "how long calls are still taken after SIGTERM, while not ready",
        "--not-ready SECONDS",
        "0",
    ),
    Variable(
        "MX_SERVER_DRAIN_SECS",
        "server",
        "how long running calls may take to finish after SIGTERM or SIGINT",
        "--drain SECONDS",
        "10",
    ),
    Variable(
        "MX_HEARTBEAT_TIMEOUT_SECS",
        "server",
        "a worker is STALE this long after its last heartbeat",
        "--heartbeat-timeout SECONDS",
        "90",
    ),
    Variable(
        "MX_GC_TIMEOUT_SECS", "server", "a record that was STALE this long is deleted", "--gc-timeout SECONDS", "3600"
    ),
    Variable(
        "MODEL_EXPRESS_CACHE_DIRECTORY",
        "server",
        "where model files are cached; replicas of a server may share it",
        "--cache-dir FOLDER",
        "as the hub's own",
    ),
    Variable(
        "MX_CACHE_MAX_BYTES",
        "server",
        "size limit of the model cache, such as 500GiB; 0 is none",
        "--cache-max-bytes BYTES",
        "0",
    ),
    Variable(
        "MX_CACHE_MIN_FREE_BYTES",
        "server",
        "what the cache leaves free on its disk, such as 10GiB",
        "--cache-min-free-bytes BYTES",
        "0",
    ),
    Variable(
        "MX_CACHE_LEASE_SECS",
        "server",
        "a replica that was silent for so long has lost its downloads to others",
        "--cache-lease SECONDS",
        "30",
    ),
    Variable(
        "MX_MODEL_SOURCES",
        "server",
        "what may be downloaded: repositories of the hub, buckets, prefixes; all unless set",
        "--model-sources NAMES",
        "all",
    ),
    Variable(
        "MX_FILE_SOURCES",
        "server",
        "folders that file:// models may be copied from, separated by ':'",
        "--file-sources FOLDERS",
        "none",
    ),
    Variable(
        "MX_DOWNLOAD_IGNORE",
        "server",
        "files of models that are not downloaded: patterns, auto or none",
        "--download-ignore PATTERNS",
        "auto",
    ),
    Variable(
        "MX_DOWNLOAD_ALLOW",
        "server",
        "patterns of the only files of models that are downloaded",
        "--download-allow PATTERNS",
        "all",
    ),
    # Certificates: the same names on both sides.
    Variable(
        "MX_TLS_CERT_FILE",
        "both",
        "PEM chain of this process' certificate; read again when it changes",
        "--tls-cert FILE",
        "none: no TLS",
    ),
    Variable("MX_TLS_KEY_FILE", "both", "PEM key of the certificate", "--tls-key FILE", "none"),
    Variable(
        "MX_TLS_CLIENT_CA_FILE",
        "both",
        "PEM certificates that clients' certificates must come from (mTLS)",
        "--tls-client-ca FILE",
        "none: any client",
    ),
    # The worker's.
    Variable("MX_TLS_CA_FILE", "worker", "PEM certificates that those of servers and workers must come from"),
    Variable("MX_TLS_PEER_NAME", "worker", "the name to expect in other workers' certificates"),
    Variable(
        "MX_AUTH_TOKEN_PATH",
        "worker",
        "file with the token that calls to the server carry; it may rotate. /var/run/secrets/tokens/modelexpress "
        "unless set, where there is one",
    ),
    Variable("MX_AUTH_TOKEN_IN_CLEAR", "worker", "1: the token also goes over connections that are not encrypted"),
    Variable(
        "MODEL_EXPRESS_URL",
        "worker",
        "the server: host:port, http(s):// or grpc(s)://host:port, or a target of gRPC (dns:, ipv4:, ipv6:) that names "
        "one host; wins over MX_SERVER_ADDRESS",
    ),
    Variable("MX_SERVER_ADDRESS", "worker", "as MODEL_EXPRESS_URL"),
    Variable("MX_SERVER_TIMEOUT_SECS", "worker", "deadline of a call to the server"),
    Variable("MX_WORKER_HOST", "worker", "the host that this worker advertises to others"),
    Variable("MX_WORKER_GRPC_PORT", "worker", "port of the worker's gRPC service, plus the device's index"),
    Variable("MX_HEARTBEAT_INTERVAL_SECS", "worker", "time between two heartbeats"),
    Variable("MX_TRANSFER_TIMEOUT", "worker", "a transfer that takes longer and comes at less than 1 MB/s ends"),
    Variable("MX_STALL_TIMEOUT_SECS", "worker", "a transfer without progress for this long has failed"),
    Variable(
        "MX_ON_BAD_MEMORY",
        "worker",
        "when a worker finds its own weights changed while it serves: withdraw (its engine goes on) or end the engine",
    ),
    Variable("MX_SOURCE_WAIT_SECS", "worker", "how long to wait for a worker that reads storage for all"),
    Variable(
        "MX_SOURCE_RATE_LIMIT",
        "worker",
        "bytes a second that a source sends, such as 500MB; 0: no limit. "
        "Readers that take its memory by themselves (on its host, by RDMA) are not limited",
    ),
    Variable(
        "MX_WORKER_CHUNK_PORT",
        "worker",
        "the port from which weights are sent over TCP, plus the rank; 0, or one in use: any that is free",
    ),
    Variable("MX_SOURCE_MAX_READERS", "worker", "how many workers may read from a source at a time"),
    Variable("MX_DRAIN_TIMEOUT_SECS", "worker", "how long readers may take to finish when the worker leaves"),
    Variable("MX_TRANSPORT", "worker", "how bytes move: auto, same-host, tcp or rdma"),
    Variable(
        "MX_TCP_TRANSFER",
        "worker",
        "how host memory goes over TCP: sockets (our own connections), or nixl (by UCX; device memory always does)",
    ),
    Variable(
        "MX_CHUNK_TLS",
        "worker",
        "auto: weights go by TLS between workers that have certificates; off: in clear, as without certificates",
    ),
    Variable(
        "MX_P2P_TOPOLOGY",
        "worker",
        "where this worker is: zone=a,rack=r7,host=n3, a JSON object of such pairs, or a file or folder of Kubernetes' "
        "downward API with such labels; near sources are taken first (docs/explanation/swarm.md)",
    ),
    Variable(
        "POD_NAME", "worker", "the name of this worker's pod, for the status page; in a pod its host name unless set"
    ),
    Variable("NODE_NAME", "worker", "the name of its node; the host of MX_P2P_TOPOLOGY unless set"),
    Variable("MX_P2P_TOPOLOGY_LEVELS", "worker", "names of the levels of a place, from broad to narrow"),
    Variable(
        "MX_P2P_TOPOLOGY_DOMAIN", "worker", "the level, such as zone, that sources must share; others are not taken"
    ),
    Variable("MX_P2P_TOPOLOGY_ENFORCEMENT", "worker", "preferred: that level is not required"),
    Variable(
        "MX_RDMA_NIC_PIN",
        "worker",
        "auto: each device uses the RDMA port that is near to it, and no other device's where there are enough; or "
        "names of ports, in the order of the devices' PCI addresses. UCX chooses unless set",
    ),
    Variable("MX_RDMA_NIC_PIN_MIN_RATE_GBPS", "worker", "ports below it are left out; unless set all but the fastest"),
    Variable("MX_LAYOUT", "worker", "which kind of layout is exchanged: auto, processed or raw"),
    Variable("MX_NIXL_BACKEND", "worker", "the NIXL backend"),
    Variable(
        "MX_READ_MODE",
        "worker",
        "how files are read: auto, buffered, mapped, direct or uring; engine: by the engine's own loader",
    ),
    Variable(
        "MX_GPUDIRECT_STORAGE", "worker", "auto: from the disk straight into device memory where that is proven; off"
    ),
    Variable("MX_HOST_MEMORY_LIMIT", "worker", "host memory that reading may hold beside the model, such as 8GiB"),
    Variable("MX_MODEL_REVISION", "worker", "the model's revision, where the engine names none"),
    Variable("MX_MODEL_URI", "worker", "where weights lie: s3://, gs://, az://, file:// or a folder"),
    Variable("MODEL_EXPRESS_NO_SHARED_STORAGE", "worker", "1: model files come from the server over gRPC"),
    Variable("MX_CACHE_WEIGHTS", "worker", "0: weights from the server go into the model without touching the disk"),
    Variable(
        "MX_MODEL_SIGNATURE",
        "worker",
        "require: nothing is loaded, taken or served but files that were signed (docs/how-to/signing.md); off; any "
        "other word counts as require",
    ),
    Variable(
        "MX_MODEL_SIGNATURE_FILE", "worker", "the signature: a name in the model's folder, or a path of this machine"
    ),
    Variable("MX_MODEL_SIGNATURE_KEY", "worker", "PEM public key of who signs models"),
    Variable("MX_MODEL_SIGNATURE_CA", "worker", "PEM certificates that the signer's certificate comes from, instead"),
    Variable("MX_MODEL_SIGNATURE_IDENTITY", "worker", "who signs without a key, instead: an address or a URI"),
    Variable("MX_MODEL_SIGNATURE_ISSUER", "worker", "the OpenID Connect issuer that knows that identity: a URL"),
    Variable("MX_MODEL_SIGNATURE_TRUST", "worker", "the trusted root of the Sigstore that certified it: a JSON file"),
    Variable("MX_LOAD_PATHS", "worker", "where weights may come from, in this order (docs/explanation/loading.md)"),
    Variable(
        "MX_SOURCE_KEEP",
        "worker",
        "which weights a source keeps and offers: processed, raw, or both (costs memory: docs/reference/vllm.md)",
    ),
    Variable(
        "MX_MODEL_NAME_OVERRIDE",
        "worker",
        "the model's name towards other workers, where their paths to it differ",
    ),
    Variable(
        "MX_METRICS_PORT",
        "worker",
        "port of the metrics of all ranks of an engine on a machine (docs/reference/metrics.md); none unless set",
    ),
    Variable("MX_METRICS_ENABLED", "worker", "0: no metrics, whatever the port"),
    # The load formats mx-source and mx-target alone.
    Variable("MODEL_NAME", "worker", "mx-source, mx-target: the model's name, by which the two find each other"),
    Variable("MX_EXPECTED_WORKERS", "worker", "mx-source, mx-target: ranks to wait for; 0: those of the engine itself"),
    Variable("MX_SYNC_PUBLISH", "worker", "mx-source: 1: a rank is offered when all ranks of the source are published"),
    Variable("MX_SYNC_START", "worker", "mx-target: 1: ranks begin together, when every rank has a source"),
    # Read by the plugin, before vLLM has a configuration.
    Variable(
        "VLLM_LOAD_FORMAT",
        "plugin",
        "the load format of a command that gives no --load-format; one that vLLM does not know is left out",
    ),
    Variable(
        "MX_UPDATE_TOKEN_PATH",
        "plugin",
        "file with the token that `POST /mx/update` asks for, in place of the engine's API key; it may rotate",
    ),
)

BY_NAME: dict[str, Variable] = {variable.name: variable for variable in VARIABLES}

# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_KUBERNETES_VALUE = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)
_KUBERNETES_NAME = re.compile(
    r".+_SERVICE_HOST|.+_SERVICE_PORT(_[A-Z0-9_]+)?|.+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?"
)


def is_kubernetes_value(value: str) -> bool:
    """Whether Kubernetes made this value for a service (`tcp://10.0.0.1:8001`): no setting, also under our names."""
    return _KUBERNETES_VALUE.match(value.strip()) is not None


def is_kubernetes_variable(name: str, value: str) -> bool:
    """Whether Kubernetes injects such a variable for a service that happens to have a name like ours."""
    return is_kubernetes_value(value) or _KUBERNETES_NAME.fullmatch(name) is not None


def setting(environ: Mapping[str, str], name: str) -> str | None:
    """The value of a name without surrounding blanks; None when it is unset, empty or made by Kubernetes."""
    value = environ.get(name, "").strip()
    return value if value and not is_kubernetes_value(value) else None


def misspelt(environ: Mapping[str, str]) -> list[tuple[str, str | None]]:
    """Names that look like ours and are not, each with the right one that is near, sorted by name."""
    unknown = [
        name
        for name, value in environ.items()
        if name.startswith(PREFIXES) and not _is_known(name) and not is_kubernetes_variable(name, value)
    ]
    return [(name, _nearest(name)) for name in sorted(unknown)]


def _is_known(name: str) -> bool:
    return name in BY_NAME or name in _INSTEAD or any(is_unused(name, entry) for entry in UNUSED)


_INSTEAD = {removed.name: removed.instead for removed in REMOVED}


def removed(environ: Mapping[str, str]) -> list[str]:
    """A line for each name that is set and was a setting once: what replaced it."""
    return [
        f"{name} is no setting any more: {_INSTEAD[name]}"
        for name in sorted(_INSTEAD)
        if setting(environ, name) and not is_kubernetes_variable(name, environ[name])
    ]


def _nearest(name: str) -> str | None:
    """The prefixes are long and say little: names are near by what follows them."""
    prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    others = sorted(
        (known for known in BY_NAME if known.startswith(PREFIXES)), key=lambda known: known[: len(prefix)] == prefix
    )
    stems = {known.removeprefix("MX_").removeprefix("MODEL_EXPRESS_"): known for known in others}
    near = nearest(name.removeprefix(prefix), stems)
    return None if near is None else stems[near]


_PROTECTING = {"AUDIENCE", "AUDIENCES", "AUTH", "MTLS", "SECURITY", "SIGNATURE", "SSL", "TLS"}


def unprotected(environ: Mapping[str, str]) -> str:
    """Why what the environment asks for would be less protected than somebody believes; else an empty text.

    Said of a name that is no setting and looks like one that protects: to ignore it would open what it was to close.
    """
    lines = []
    for name, near in misspelt(environ):
        if setting(environ, name) and _PROTECTING & {*name.split("_"), *(near or "").split("_")}:
            hint = f", did you mean {near}?" if near else ":"
            lines.append(f"{name} is no setting{hint} it looks like one that protects, so it is not ignored")
    lines += [line for line in removed(environ) if _PROTECTING & {*line.partition(" ")[0].split("_")}]
    return f"{'; '.join(lines)}; correct or unset it (docs/reference/settings.md has the names)" if lines else ""


def without_effect(environ: Mapping[str, str], reader: Literal["server", "worker"]) -> list[str]:
    """The names that are set, mean something to NVIDIA's ModelExpress, and nothing to this reader."""
    return [
        name
        for entry in UNUSED
        if entry.reader == reader
        for name in sorted(environ)
        if is_unused(name, entry) and not is_kubernetes_variable(name, environ[name]) and setting(environ, name)
    ]


def warnings_for(environ: Mapping[str, str], reader: Literal["server", "worker"]) -> list[str]:
    """One line for every unknown name, and one for all that have no effect."""
    lines = [
        f"{name} is no setting" + (f"; the nearest one is {near}" if near else "") for name, near in misspelt(environ)
    ]
    lines += removed(environ)
    if unused := without_effect(environ, reader):
        have = "has" if len(unused) == 1 else "have"
        lines.append(f"{', '.join(unused)} {have} no effect here (docs/reference/settings.md says why)")
    return lines
