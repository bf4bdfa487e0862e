"""What is published under a name and a version, and who has it: identities, settings, and the wait for a version."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Mapping
from urllib.parse import quote, unquote

from mxcore.errors import NoSource
from mxcore.settings import WorkerSettings, load_settings
from mxcore.transfer.member import PROTOCOL_VERSION
from mxserver.wire import ServerRefused, ServerUnreachable, SettingError
from mxserver.wire.calls import ServerClient, source_id
from mxserver.wire.proto import mx_pb2, p2p_pb2

__all__ = ["identity_of", "named_by", "published_uri", "settings_of", "version_text", "wait_for_version"]

logger = logging.getLogger(__name__)

PUBLISHED_PARAMETER = "published"
"""The extra parameter of what was published by `publish`: a digest of name and version, which ids do not lower-case."""

_SCHEME = "mx://"
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0
_NAMED_VERSIONS = 5


def version_text(version: int | str) -> str:
    """A version as it is published. Raises SettingError for none, and for a negative number."""
    text = str(version)
    if not text or text.startswith("-") or isinstance(version, bool):
        raise SettingError(f"version {version!r}: a whole number from 0 on, or a text that is not empty")
    return text


def identity_of(name: str, version: str) -> p2p_pb2.SourceIdentity:
    """What processes that exchange these tensors have in common. Raises SettingError for an empty name."""
    if not name:
        raise SettingError("the name that tensors are published under is empty")
    exact = hashlib.sha256(json.dumps([name, version]).encode()).hexdigest()[:16]
    return p2p_pb2.SourceIdentity(
        mx_version=PROTOCOL_VERSION,
        model_name=name,
        revision=version,
        extra_parameters={"layout": "raw", PUBLISHED_PARAMETER: exact},
    )


def published_uri(name: str, version: str) -> str:
    """What names a published version where a URI is asked for: mx://NAME/VERSION."""
    return f"{_SCHEME}{quote(name)}/{quote(version, safe='')}"


def named_by(uri: str) -> tuple[str, str] | None:
    """The name and the version of mx://NAME/VERSION; None for other URIs. Raises SettingError."""
    if not uri.startswith(_SCHEME):
        return None
    name, _, version = uri.removeprefix(_SCHEME).rpartition("/")
    if not name or not version:
        raise SettingError(f"{uri}: a published version is named mx://NAME/VERSION")
    return unquote(name), unquote(version)


def settings_of(server: str | None, given: Mapping[str, object] | None) -> WorkerSettings:
    """The environment's settings and, before these, the ones that are given by name.

    Raises SettingError for a value that is refused, and where no server is named anywhere.
    """
    mine = {**(given or {}), **({"server_address": server} if server is not None else {})}
    refused: list[str] = []
    load_settings(mine, {}, told=True, refused=refused)
    if refused:
        raise SettingError("; ".join(refused))
    settings = load_settings({"worker_grpc_port": 0, **mine})
    if settings.server_address is None:
        raise SettingError("no server: name it by server=, by MODEL_EXPRESS_URL or by MX_SERVER_ADDRESS")
    return settings


def wait_for_version(
    client: ServerClient, name: str, version: str | None, *, rank: int, newer_than: int | None, wait_seconds: float
) -> str:
    """The version that a process has complete for this rank: the one that is asked for, or the newest.

    Waits for it at most `wait_seconds`. The newest is the highest number; other versions have no order. A publisher
    that withdrew it, since its memory had changed, is logged at once: another one may still publish it.

    Raises:
        NoSource: nobody has it in time; the message says what there is, and what was withdrawn.
        ServerUnreachable: no answer from the server at the end of the wait.
        ServerRefused: the server says no.
    """
    deadline = time.monotonic() + wait_seconds
    pause = _FIRST_PAUSE_SECONDS
    known: dict[str, str | None] = {}
    withdrawn = _Withdrawn(client, name, version, rank)
    while True:
        failure: ServerUnreachable | None = None
        try:
            there = _versions(client, name, rank, known)
            if (found := _chosen(name, there, version, newer_than)) is not None:
                return found
            withdrawn.look(last=deadline <= time.monotonic())
        except ServerUnreachable as error:
            failure = error
        left = deadline - time.monotonic()
        if left <= 0:
            if failure is not None:
                raise failure
            raise NoSource(_nobody(name, there, version, rank, newer_than, wait_seconds) + withdrawn.text())
        time.sleep(min(left, pause * random.uniform(0.5, 1.0)))  # noqa: S311 - no secret
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


class _Withdrawn:
    """Publishers of what is waited for that found their own memory changed, and serve it no more."""

    def __init__(self, client: ServerClient, name: str, version: str | None, rank: int) -> None:
        self._client = client
        self._name = name
        self._version = version
        self._rank = rank
        self._looks = 0
        self._told: dict[str, str] = {}

    def look(self, *, last: bool) -> None:
        """Asks at the first, second, fourth, eighth ... call and at the `last`; logs each worker once."""
        self._looks += 1
        if self._looks & (self._looks - 1) and not last:
            return
        try:
            doubts = self._client.doubts()
        except ServerRefused:  # a server that keeps none
            return
        for doubt in doubts:
            if doubt.kind != mx_pb2.DOUBT_KIND_OWN_MEMORY or doubt.worker_rank != self._rank:
                continue
            if doubt.worker_id not in self._told and self._is_wanted(doubt):
                self._told[doubt.worker_id] = doubt.text
                logger.warning(
                    "%s of %r was withdrawn by its publisher %s: %s",
                    "a version" if self._version is None else f"version {self._version}",
                    self._name,
                    doubt.worker_id,
                    doubt.text,
                )

    def _is_wanted(self, doubt: mx_pb2.Doubt) -> bool:
        if self._version is not None:
            return doubt.mx_source_id == source_id(identity_of(self._name, self._version))
        record = self._client.get_metadata(doubt.mx_source_id, doubt.worker_id)
        return record is not None and record.identity.model_name == self._name

    def text(self) -> str:
        """The end of a message; empty when there are none."""
        workers = [f"; worker {worker} withdrew it: {text}" for worker, text in list(self._told.items())[:2]]
        return "".join(workers)


def _versions(client: ServerClient, name: str, rank: int, known: dict[str, str | None]) -> set[str]:
    """What is READY under this name for this rank; `known` has the version of each source id that was looked up."""
    refs = client.list_sources(model_name=name, status=p2p_pb2.SOURCE_STATUS_READY, worker_rank=rank)
    for ref in refs:
        if ref.mx_source_id not in known:
            record = client.get_metadata(ref.mx_source_id, ref.worker_id)
            if record is None:
                continue
            revision = record.identity.revision
            is_ours = record.mx_source_id == ref.mx_source_id == source_id(identity_of(name, revision))
            known[ref.mx_source_id] = revision if is_ours else None
    return {found for ref in refs if (found := known.get(ref.mx_source_id)) is not None}


def _chosen(name: str, there: set[str], version: str | None, newer_than: int | None) -> str | None:
    if version is not None:
        return version if version in there else None
    numbers = [int(found) for found in there if found.isdecimal()]
    if newer_than is not None:
        newest = max(numbers, default=-1)
        return str(newest) if newest > newer_than else None
    if len(numbers) < len(there) and len(there) > 1:
        raise NoSource(f"{name!r} has versions without an order ({_some(there)}): say which is wanted")
    return str(max(numbers)) if numbers else next(iter(there), None)


def _nobody(
    name: str, there: set[str], version: str | None, rank: int, newer_than: int | None, wait_seconds: float
) -> str:
    wanted = f"version {version}" if version is not None else "any version"
    if newer_than is not None:
        wanted = f"a version after {newer_than}"
    waited = f" within {wait_seconds:g} s" if wait_seconds else ""
    others = f"there is {_some(there)}" if there else "nothing is published under that name for this rank"
    return f"nobody has {wanted} of {name!r} for rank {rank}{waited}: {others}"


def _some(versions: set[str]) -> str:
    shown = sorted(versions)
    more = len(shown) - _NAMED_VERSIONS
    return ", ".join(shown[:_NAMED_VERSIONS]) + (f" and {more} more" if more > 0 else "")
