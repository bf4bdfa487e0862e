"""What callers may take of the server: every limit with its name, its default and its meaning.

`--print-config` prints those in force, `MX_SERVER_LIMITS` changes any of them, and a refusal for one names it
(tests/security/test_admission.py, tests/server/services/test_bounds.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

SETTING = "MX_SERVER_LIMITS"

_MiB = 1024 * 1024


def _limit(default: int, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """All limits. Names that end in `_bytes` are bytes, those that end in `_seconds` seconds, all others are counts."""

    calls: int = _limit(20_000, "calls that are in progress at once, of all clients; more are refused")
    streams_per_client: int = _limit(64, "streams of files and downloads that one client has open at once")
    request_bytes: int = _limit(4 * _MiB, "one request, unless it publishes")
    publish_bytes: int = _limit(100 * _MiB, "one request that publishes, with all that it says of tensors")
    request_parts: int = _limit(200_000, "entries of lists in a request, such as tensors")
    model_name_bytes: int = _limit(512, "a model's name in a record")
    worker_id_bytes: int = _limit(256, "a worker's id, accelerator, pod, node or engine, each, in a record")
    identity_bytes: int = _limit(64 * 1024, "a record's identity, with its extra parameters")
    topology_bytes: int = _limit(16 * 1024, "a worker's topology, which is in every listing")
    records: int = _limit(100_000, "records that are stored")
    records_per_worker: int = _limit(1_024, "records, one a rank, of one worker of one source")
    stored_bytes: int = _limit(768 * _MiB, "identities and metadata of all records")
    listing_rows: int = _limit(20_000, "workers in one answer of ListSources")
    listing_bytes: int = _limit(16 * _MiB, "one answer of ListSources")
    watches: int = _limit(20_000, "streams of workers that wait for weights or receive them")
    watches_per_client: int = _limit(4_096, "of these, those of one host, and of one caller there")
    answer_bytes: int = _limit(128 * _MiB, "answers under way, that their clients have not taken yet, together")
    silence_seconds: int = _limit(
        30, "silence of a client that is connected, after which it is asked for a sign of life"
    )

    def refusal(self, name: str, found: str) -> str:
        """What a refusal says: `found` what is over, the limit's name and value, and the setting that raises it."""
        most = getattr(self, name)
        return f"{found}; the limit is {name}={most}, which {SETTING} of the server raises"

    def as_settings(self) -> tuple[str, ...]:
        """`name=value` of each, as the setting takes them."""
        return tuple(f"{one.name}={getattr(self, one.name)}" for one in fields(self))


MEANINGS = {one.name: str(one.metadata["meaning"]) for one in fields(ServerLimits)}
DEFAULT = ServerLimits()


def changed(pairs: dict[str, int]) -> ServerLimits:
    """The defaults with these changes. Raises ValueError for a name that is no limit, or a number below 1."""
    for name, value in pairs.items():
        if name not in MEANINGS or value < 1:
            raise ValueError(f"{name}={value} is no limit")
    return replace(DEFAULT, **pairs)
