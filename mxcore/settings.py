"""The worker's settings: environment names, defaults, rules.

A worker never refuses to start because of a setting: a bad value is replaced by the default with a warning (setting,
value, rule), a misspelt name warns with the nearest known one, and what Kubernetes injects for services is ignored.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Mapping
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mxcore.load_ladder import RUNGS, chosen_rungs
from mxcore.storage.plan import parse_bytes
from mxserver.wire import SettingError, environment, is_host, nearest, parse_server_address, split_scheme

__all__ = ["OwnAddress", "WorkerSettings", "load_settings"]

logger = logging.getLogger(__name__)

_URL, _ADDRESS = "MODEL_EXPRESS_URL", "MX_SERVER_ADDRESS"
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|KiB|MiB|GiB)", re.IGNORECASE)
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SECRET = re.compile(r"//[^/]*@")
TOPOLOGY_LEVELS = ("region", "zone", "datacenter", "block", "rack", "host")
_LOOPBACK_NAMES = ("localhost", "ip6-localhost")


class OwnAddress(NamedTuple):
    """A host, and whether it is a guess: there is no way to the server yet (its name may resolve later)."""

    host: str
    guessed: bool = False

    @property
    def is_loopback(self) -> bool:
        """Whether it is reached from this host alone; a guess never counts as that."""
        local = self.host in _LOOPBACK_NAMES or self.host.startswith("127.") or self.host == "::1"
        return local and not self.guessed


class WorkerSettings(BaseModel):
    """A worker's settings; `load_settings` reads them from the environment. Immutable.

    Each field's alias is its environment name; mxserver.wire.environment has the meanings in one table. Times are
    in seconds.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    server_address: str | None = Field(None, alias="MX_SERVER_ADDRESS")
    server_timeout_seconds: float = Field(5.0, alias="MX_SERVER_TIMEOUT_SECS", gt=0, le=3600)
    worker_host: str | None = Field(None, alias="MX_WORKER_HOST", min_length=1)
    worker_grpc_port: int = Field(6555, alias="MX_WORKER_GRPC_PORT", ge=0, le=65535)
    worker_chunk_port: int = Field(0, alias="MX_WORKER_CHUNK_PORT", ge=0, le=65535)
    heartbeat_interval_seconds: float = Field(30.0, alias="MX_HEARTBEAT_INTERVAL_SECS", gt=0, le=3600)
    transfer_timeout_seconds: float = Field(600.0, alias="MX_TRANSFER_TIMEOUT", gt=0)
    stall_timeout_seconds: float = Field(4.0, alias="MX_STALL_TIMEOUT_SECS", gt=0, le=3600)
    on_bad_memory: Literal["withdraw", "end"] = Field("withdraw", alias="MX_ON_BAD_MEMORY")
    drain_timeout_seconds: float = Field(30.0, alias="MX_DRAIN_TIMEOUT_SECS", ge=0, le=3600)
    source_wait_seconds: float = Field(300.0, alias="MX_SOURCE_WAIT_SECS", ge=0, le=86400)
    source_rate_limit: float = Field(0.0, alias="MX_SOURCE_RATE_LIMIT", ge=0)
    source_max_readers: int = Field(8, alias="MX_SOURCE_MAX_READERS", ge=1, le=256)
    transport: Literal["auto", "same-host", "tcp", "rdma"] = Field("auto", alias="MX_TRANSPORT")
    tcp_transfer: Literal["sockets", "nixl"] = Field("sockets", alias="MX_TCP_TRANSFER")
    chunk_tls: Literal["auto", "off"] = Field("auto", alias="MX_CHUNK_TLS")
    layout: Literal["auto", "processed", "raw"] = Field("auto", alias="MX_LAYOUT")
    topology: str = Field("", alias="MX_P2P_TOPOLOGY", max_length=65536)
    pod_name: str = Field("", alias="POD_NAME")
    node_name: str = Field("", alias="NODE_NAME")
    topology_required: str = Field("", alias="MX_P2P_TOPOLOGY_DOMAIN", max_length=64)
    topology_levels: tuple[str, ...] = Field(TOPOLOGY_LEVELS, alias="MX_P2P_TOPOLOGY_LEVELS", min_length=1)
    nic_pin: str = Field("", alias="MX_RDMA_NIC_PIN", max_length=4096)
    nic_pin_least_gbps: float | None = Field(None, alias="MX_RDMA_NIC_PIN_MIN_RATE_GBPS", ge=0)
    nixl_backend: str = Field("UCX", alias="MX_NIXL_BACKEND", min_length=1)
    read_mode: Literal["auto", "buffered", "mapped", "direct", "uring", "engine"] = Field("auto", alias="MX_READ_MODE")
    gpudirect_storage: Literal["auto", "off"] = Field("auto", alias="MX_GPUDIRECT_STORAGE")
    host_memory_limit: str | None = Field(None, alias="MX_HOST_MEMORY_LIMIT")
    model_revision: str = Field("", alias="MX_MODEL_REVISION")
    model_uri: str = Field("", alias="MX_MODEL_URI")
    no_shared_storage: bool = Field(False, alias="MODEL_EXPRESS_NO_SHARED_STORAGE")
    model_signature: Literal["off", "require"] = Field("off", alias="MX_MODEL_SIGNATURE")
    model_signature_file: str = Field("model.sig", alias="MX_MODEL_SIGNATURE_FILE", min_length=1)
    model_signature_key: str = Field("", alias="MX_MODEL_SIGNATURE_KEY")
    model_signature_ca: str = Field("", alias="MX_MODEL_SIGNATURE_CA")
    model_signature_identity: str = Field("", alias="MX_MODEL_SIGNATURE_IDENTITY")
    model_signature_issuer: str = Field("", alias="MX_MODEL_SIGNATURE_ISSUER")
    model_signature_trust: str = Field("", alias="MX_MODEL_SIGNATURE_TRUST")
    cache_weights: bool = Field(True, alias="MX_CACHE_WEIGHTS")
    source_keep: Literal["processed", "raw", "both"] | None = Field(None, alias="MX_SOURCE_KEEP")
    model_name: str = Field("", alias="MODEL_NAME")
    model_name_override: str = Field("", alias="MX_MODEL_NAME_OVERRIDE")
    expected_workers: int = Field(0, alias="MX_EXPECTED_WORKERS", ge=0, le=65536)
    sync_publish: bool = Field(False, alias="MX_SYNC_PUBLISH")
    sync_start: bool = Field(False, alias="MX_SYNC_START")
    load_paths: tuple[str, ...] = Field(tuple(RUNGS), alias="MX_LOAD_PATHS")
    metrics_port: int | None = Field(None, alias="MX_METRICS_PORT", ge=1, le=65535)
    metrics_enabled: bool = Field(True, alias="MX_METRICS_ENABLED")

    @property
    def reader_mode(self) -> Literal["auto", "buffered", "mapped", "direct", "uring"]:
        """How our own reader reads, where the engine's does not."""
        return "auto" if self.read_mode == "engine" else self.read_mode

    @field_validator("server_address")
    @classmethod
    def _parsed_address(cls, value: str | None) -> str | None:
        try:
            return parse_server_address(value) if value is not None else None
        except SettingError as error:
            raise ValueError(error.args[0]) from error

    @field_validator("worker_host")
    @classmethod
    def _host_alone(cls, value: str | None) -> str | None:
        if value is not None and not is_host(value):
            raise ValueError("it must be a name or an address alone, such as worker-3, 10.0.0.7 or fd00::7")
        return value

    @field_validator("model_signature", mode="before")
    @classmethod
    def _off_only_by_name(cls, value: object) -> object:
        """A word that is misspelt must not open what it was to close: it counts as `require`."""
        return "off" if isinstance(value, str) and value.strip().lower() == "off" else "require"

    @field_validator("topology_levels", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("load_paths", mode="before")
    @classmethod
    def _rungs(cls, value: object) -> object:
        if isinstance(value, str):
            return chosen_rungs(value)
        return chosen_rungs(",".join(map(str, value))) if isinstance(value, list | tuple) else value

    @field_validator("host_memory_limit")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @field_validator("source_rate_limit", mode="before")
    @classmethod
    def _with_unit(cls, value: object) -> object:
        match = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
        return float(match[1]) * _UNITS[match[2].upper()] if match else value

    def own_address(self) -> OwnAddress:
        """What other workers call: MX_WORKER_HOST, or this host's address towards the server. May wait for DNS."""
        return OwnAddress(self.worker_host) if self.worker_host else _address_towards(self.server_address)

    @property
    def shares_only_this_host(self) -> bool:
        """Whether nothing beyond the loopback interface needs to reach this worker."""
        return self.own_address().is_loopback


def load_settings(
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    told: bool = False,
    refused: list[str] | None = None,
) -> WorkerSettings:
    """The settings of this worker; never raises for a value.

    `overrides` come from the engine, by environment name (MX_LAYOUT) or field name (layout), and win over `environ`
    (this process' environment by default). MODEL_EXPRESS_URL wins over MX_SERVER_ADDRESS in either. With `told`,
    warnings are debug lines: another process of the same worker logs them. To `refused` one line is added for each
    value that was set and could not be used.
    """
    refusals = [] if refused is None else refused
    before = len(refusals)
    variables = os.environ if environ is None else environ
    level = logging.DEBUG if told else logging.WARNING
    for line in environment.warnings_for(variables, "worker"):
        logger.log(level, "%s", line)
    values: dict[str, object] = {}
    given = _with_field_names(overrides or {}, level)
    if "server_address" not in given:
        refusals += [
            f"{name}={variables[name].strip()!r} counts as unset, as Kubernetes sets such values: write host:port"
            for name in (_URL, _ADDRESS)
            if environment.is_kubernetes_value(variables.get(name, ""))
        ]
    for name, field in WorkerSettings.model_fields.items():
        text = environment.setting(variables, field.alias or name)
        if text is not None:
            values[name] = text
    if environment.setting(variables, "MX_P2P_TOPOLOGY_ENFORCEMENT") == "preferred":
        values.pop("topology_required", None)
    named: dict[str, str] = {}
    if url := environment.setting(variables, _URL):
        values["server_address"] = url
        named["server_address"] = _URL
    values.update(given)
    settings = _validated(values, {field: name for field, name in named.items() if field not in given}, refusals)
    for line in refusals[before:]:
        logger.log(level, "%s", line)
    return settings


def _with_field_names(overrides: Mapping[str, object], level: int) -> dict[str, object]:
    fields = WorkerSettings.model_fields.items()
    names = {alias: name for name, field in fields for alias in (field.alias, name) if alias is not None}
    known: dict[str, object] = {}
    for key, value in overrides.items():
        if key in names:
            known.setdefault(names[key], value)
        elif key == _URL:
            known["server_address"] = value
        else:
            near = nearest(key, (*names, _URL))
            logger.log(level, "%s is no setting of the worker%s", key, f"; the nearest one is {near}" if near else "")
    return known


def _validated(values: dict[str, object], named: Mapping[str, str], refused: list[str]) -> WorkerSettings:
    """`named`: fields whose value came from another name than their alias. `refused` gets a line for each bad value."""
    try:
        return WorkerSettings.model_validate(values)
    except ValidationError as error:
        fields = WorkerSettings.model_fields
        aliases = {field.alias: name for name, field in fields.items()}
        good = dict(values)
        for problem in error.errors():
            location = str(problem["loc"][0])
            name = aliases.get(location, location)
            value = good.pop(location, good.pop(name, None))
            default = fields[name].default
            shown = "(a value with a password)" if _SECRET.search(str(value)) else repr(value)
            instead = "it counts as unset" if default is None else f"the default {default!r} is used"
            rule = problem["msg"].removeprefix("Value error, ")
            refused.append(f"{named.get(name, fields[name].alias)}={shown} is refused: {rule}; {instead}")
        return WorkerSettings.model_validate(good)


_ANYWHERE = ("192.0.2.1", "2001:db8::1")  # RFC 5737 and 3849: nobody has them, so the default route leads there


def _address_towards(server_address: str | None) -> OwnAddress:
    """The local address of packets to the server, else of those that leave this host; loopback without a server."""
    host, _, port = split_scheme(server_address or "127.0.0.1:1")[1].rpartition(":")
    if found := _local_address(host.strip("[]"), int(port)):
        return OwnAddress(found)
    return OwnAddress(next(filter(None, (_local_address(place, 9) for place in _ANYWHERE)), "127.0.0.1"), guessed=True)


def _local_address(host: str, port: int) -> str:
    """This host's address of packets to `host`; empty without a way. Sends nothing (a connected UDP socket)."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        logger.debug("no way to %s: %s", host, error)
        return ""
