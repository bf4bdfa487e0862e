"""Names that manifests for NVIDIA's ModelExpress set and that have no effect here, each with why.

They are known, so that whoever moves such a manifest here is told once, in one line, and not that each is misspelt.
docs/reference/settings.md is made from this table.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Unused(NamedTuple):
    """Some names of one subject. One that ends in `*` stands for all names that begin so."""

    names: tuple[str, ...]
    reader: Literal["server", "worker"]
    meaning: str
    reason: str


UNUSED: tuple[Unused, ...] = (
    Unused(
        ("MX_AUTH_TOKEN_TTL_SECONDS",),
        "worker",
        "how long the token of a file is kept",
        "the file is looked at before each call, and read again when it has changed",
    ),
    Unused(
        ("MODEL_EXPRESS_CACHE_DIRECTORY",),
        "worker",
        "where a worker keeps model files",
        "the hub's cache is used: `--download-dir`, `HF_HUB_CACHE` or `HF_HOME` choose it",
    ),
    Unused(("MODEL_EXPRESS_TRANSFER_CHUNK_SIZE",), "worker", "bytes a message of a file", "the server chooses"),
    Unused(
        ("MODEL_EXPRESS_LOG_LEVEL", "MX_TRANSFER_LOG_DIR", "MX_DISCOVER_COST"),
        "worker",
        "the worker's log",
        "it is vLLM's (`VLLM_LOGGING_LEVEL`); `report_path` names a file for the load's report",
    ),
    Unused(
        ("MX_METADATA_PORT", "MX_NIXL_METADATA_TIMEOUT"),
        "worker",
        "NIXL's own exchange of metadata",
        "it is not used: workers tell each other over gRPC",
    ),
    Unused(
        ("MX_P2P_METADATA", "MX_PUBLISH_TIMEOUT_SECS", "MX_SOURCE_QUERY_TIMEOUT"),
        "worker",
        "where tensor descriptors are kept, and how long publishing and asking may take",
        "the source always tells its descriptors itself; `MX_SERVER_TIMEOUT_SECS` is the deadline of a call",
    ),
    Unused(
        ("MX_METADATA_BACKEND", "MX_REDIS_URL", "MX_K8S_*"),
        "worker",
        "a place for metadata that is not the server",
        "workers always ask the server: `MODEL_EXPRESS_URL`. It keeps what it knows where `--store` says",
    ),
    Unused(
        ("NIXL_UCX_TLS", "MX_UCX_DISABLE_MEM_EVENTS"),
        "worker",
        "what UCX uses",
        "`MX_TRANSPORT` chooses; `UCX_NET_DEVICES` holds",
    ),
    Unused(
        ("MX_POOL_REG", "MX_CONTIGUOUS_REG", "MX_VMM_ARENA*", "MX_ARENA_SINGLE_MR"),
        "worker",
        "how memory is registered",
        "neighbouring tensors are always registered as one region",
    ),
    Unused(
        (
            "MX_P2P_SOURCE_SELECTOR",
            "MX_P2P_LOAD_WEIGHT",
            "MX_P2P_RUNTIME_METRICS_URL",
            "MX_P2P_TOPOLOGY_LOAD_WEIGHT",
        ),
        "worker",
        "which source a worker takes",
        "chunks come from all sources at once, near ones first, rarest first (docs/explanation/swarm.md)",
    ),
    Unused(
        ("MX_DISABLE_DRAFT_P2P",),
        "worker",
        "draft models",
        'they are exchanged as models are (docs/reference/vllm.md, "Drafts"); `draft_load_config` in '
        "`--speculative-config` gives them a load format of their own",
    ),
    Unused(
        ("MX_INSTANT_TENSOR", "MX_MS_DISTRIBUTED", "MX_GDS_*"),
        "worker",
        "other ways to read files",
        "`MX_READ_MODE` and `MX_GPUDIRECT_STORAGE` choose",
    ),
    Unused(
        ("MX_LOAD_STRATEGY_CHAIN", "MX_LOAD_PLUGIN", "MX_LOAD_PLUGIN_BEFORE", "MX_PLUGIN_DIR", "MX_LOAD_MODE"),
        "worker",
        "what is tried in which order, and plugins for it",
        "`MX_LOAD_PATHS` is the order; there are no plugins",
    ),
    Unused(
        ("MX_LOAD_LAYOUT_VERSION", "MX_FP8_LOADERLESS", "MX_DISABLE_PATCHES", "MX_SKIP_FEATURE_CHECK"),
        "worker",
        "switches of its loader",
        "there is nothing to switch: a layout that differs is refused",
    ),
    Unused(("MX_REGISTER_LOADERS",), "worker", "whether load formats are registered", "`VLLM_PLUGINS` chooses"),
    Unused(("MX_ARTIFACT_*",), "worker", "moving compile caches", "compile caches are not moved"),
    Unused(
        ("MX_METRICS_PUSHGATEWAY", "MX_METRICS_SCHEME", "MX_METRICS_BIND_RETRY_SECS", "MX_METRICS_SOURCE_ID_LABEL"),
        "worker",
        "how metrics of a worker are told, and a label of them",
        "they are asked for at `MX_METRICS_PORT` (docs/reference/metrics.md); labels of a run are the scrape's to give",
    ),
    Unused(
        ("MX_REFIT_*", "MX_RESHARD_*", "MX_GENERATOR_SOURCE_ORDER", "MX_TRAINER_STAGING_MODE"),
        "worker",
        "weights that a trainer updates",
        "an engine that runs takes another version as an update ([vllm.md](vllm.md#updates))",
    ),
    Unused(("MX_WEIGHT_PAYLOAD_FORMAT",), "worker", "the form of those", "as above"),
    Unused(
        ("MX_S3_*", "MX_AZURE_*"),
        "worker",
        "how object stores are read",
        "every store is read in one way (docs/explanation/loading.md)",
    ),
    # The server's.
    Unused(
        ("MODEL_EXPRESS_CACHE_EVICTION_ENABLED",),
        "server",
        "whether models are evicted",
        "they are where `--cache-max-bytes` or `--cache-min-free-bytes` sets a limit",
    ),
    Unused(("MODEL_EXPRESS_S3_TIMEOUT_SECS",), "server", "time-out of an object store", "it cannot be chosen"),
    Unused(
        ("MODEL_EXPRESS_MAX_CONCURRENT_REQUESTS",),
        "server",
        "calls at once",
        "`calls` and `streams_per_client` of `--limits`",
    ),
    Unused(
        ("MODEL_EXPRESS_TIMEOUT", "MODEL_EXPRESS_ENDPOINT", "MODEL_EXPRESS_SERVER_ENDPOINT"),
        "server",
        "what its commands call",
        "`mx` takes `--server` or `MODEL_EXPRESS_URL`",
    ),
    Unused(
        ("MX_METADATA_NAMESPACE",),
        "server",
        "the namespace of its records",
        "nothing is kept in objects of Kubernetes: `--store` is sqlite, redis or memory",
    ),
    Unused(("MX_REAPER_SCAN_INTERVAL_SECS",), "server", "how often stale records are looked for", "each second"),
)

NOT_TOLD = ("POD_NAME", "POD_UID", "POD_NAMESPACE", "LWS_LEADER_ADDRESS")
"""Names that pods have for many reasons: not read, and not told."""


def is_unused(name: str, entry: Unused) -> bool:
    """Whether the entry is about this name."""
    return any(name.startswith(known[:-1]) if known.endswith("*") else name == known for known in entry.names)
