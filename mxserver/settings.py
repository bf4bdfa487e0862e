"""The server's settings: a flag wins over the environment, the environment over the default.

A value that breaks its rule keeps the server from starting. Values that Kubernetes injects for services of the same
name, and empty ones, count as unset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from mxserver.wire.environment import setting
from mxserver.wire.errors import SettingError

LogLevel = Literal["trace", "debug", "info", "warn", "warning", "error"]
LogFormat = Literal["text", "json"]
Traces = Literal["off", "otlp"]
Backend = Literal["sqlite", "memory"]


def _absolute(folder: Path) -> Path:
    if not folder.is_absolute():
        raise ValueError("it is no absolute path")
    return folder


DEFAULT_METRICS_PORT = 9401


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def default_store_path() -> Path:
    """`mxserver/state.sqlite3` in the user's state folder, by the XDG Base Directory Specification."""
    folder = os.environ.get("XDG_STATE_HOME", "")
    return (Path(folder) if Path(folder).is_absolute() else Path("~/.local/state").expanduser()) / (
        "mxserver/state.sqlite3"
    )


def default_cache_directory() -> Path:
    """The Hugging Face Hub's own cache folder, found as huggingface_hub does, but without importing it."""
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if folder := os.environ.get(name):
            return Path(os.path.expandvars(folder)).expanduser() / below
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP])(i?)B?|B)?", re.IGNORECASE)


def parse_bytes(value: Any) -> Any:
    """Bytes out of `500GiB`, `1.5 TB`, `10G` or a plain number; what is none of these is left to be refused."""
    match = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return value
    number, prefix, binary = match.groups()
    exponent = "KMGTP".index(prefix.upper()) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** exponent)


def _folders(value: Any) -> Any:
    return tuple(folder for folder in value.split(":") if folder) if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, lt=2**63)]
_BYTES_RULE = "bytes, or a number with KB, MB, GB, TB (or KiB, MiB, GiB, TiB); 0 is no limit"
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Seconds = Annotated[float, Field(gt=0, le=10 * 365 * 86400, allow_inf_nan=False)]


class ServerSettings(BaseSettings):
    """All settings of the server. A field's alias is its environment name, its description is its rule."""

    model_config = SettingsConfigDict(
        case_sensitive=True, env_ignore_empty=True, frozen=True, extra="ignore", str_strip_whitespace=True
    )

    port: int = Field(
        8001, ge=0, le=65535, alias="MODEL_EXPRESS_SERVER_PORT", description="a whole number from 0 to 65535"
    )
    host: str = Field(
        "0.0.0.0",  # noqa: S104 - other machines are who it serves
        min_length=1,
        pattern=r"^\S+$",
        alias="MODEL_EXPRESS_SERVER_HOST",
        description="an address or name of this machine; 0.0.0.0 is all of IPv4, :: all",
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        alias="MODEL_EXPRESS_SERVER_METRICS_PORT",
        description="a whole number from 0 to 65535",
    )
    log_format: Annotated[LogFormat, BeforeValidator(_lower)] = Field(
        "text", alias="MX_LOG_FORMAT", description="text or json"
    )
    traces: Annotated[Traces, BeforeValidator(_lower)] = Field("off", alias="MX_TRACES", description="off or otlp")
    not_ready_seconds: float = Field(
        0.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        alias="MX_SERVER_NOT_READY_SECS",
        description="a number of seconds from 0 to 3600",
    )
    log_level: Annotated[LogLevel, BeforeValidator(_lower)] = Field(
        "info", alias="MODEL_EXPRESS_LOG_LEVEL", description="debug, info, warning or error (or trace, warn)"
    )
    store: Annotated[Backend, BeforeValidator(_lower)] = Field(
        "sqlite", alias="MX_METADATA_BACKEND", description="sqlite or memory"
    )
    store_path: Path = Field(
        default_factory=default_store_path, alias="MX_STORE_PATH", description="the path of a file, to be made or ours"
    )
    drain_seconds: Seconds = Field(10.0, alias="MX_SERVER_DRAIN_SECS", description="a number of seconds greater than 0")
    heartbeat_timeout_seconds: Seconds = Field(
        90.0, alias="MX_HEARTBEAT_TIMEOUT_SECS", description="a number of seconds greater than 0"
    )
    gc_timeout_seconds: Seconds = Field(
        3600.0, alias="MX_GC_TIMEOUT_SECS", description="a number of seconds greater than 0"
    )
    cache_directory: Path = Field(
        default_factory=default_cache_directory,
        alias="MODEL_EXPRESS_CACHE_DIRECTORY",
        description="the path of a folder, to be made or ours",
    )
    cache_max_bytes: Bytes = Field(0, alias="MX_CACHE_MAX_BYTES", description=_BYTES_RULE)
    cache_min_free_bytes: Bytes = Field(0, alias="MX_CACHE_MIN_FREE_BYTES", description=_BYTES_RULE)
    cache_lease_seconds: Seconds = Field(
        30.0, alias="MX_CACHE_LEASE_SECS", description="a number of seconds greater than 0"
    )
    file_sources: Annotated[tuple[AbsolutePath, ...], NoDecode, BeforeValidator(_folders)] = Field(
        (), alias="MX_FILE_SOURCES", description="absolute paths of folders, separated by ':'"
    )

    @property
    def effective_metrics_port(self) -> int:
        """9401 unless told otherwise; a free one (0) where the calls' port is a free one, so that several fit."""
        if self.metrics_port is not None:
            return self.metrics_port
        return DEFAULT_METRICS_PORT if self.port else 0

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and environment, without what Kubernetes puts under our names."""
        if isinstance(env_settings, EnvSettingsSource):
            env_settings.env_vars = {
                name: value for name in env_settings.env_vars if (value := setting(os.environ, name)) is not None
            }
        return init_settings, env_settings


FLAGS = {
    "host": "--host",
    "port": "--port",
    "store": "--store",
    "store_path": "--store-path",
    "heartbeat_timeout_seconds": "--heartbeat-timeout",
    "gc_timeout_seconds": "--gc-timeout",
    "cache_directory": "--cache-dir",
    "cache_max_bytes": "--cache-max-bytes",
    "cache_min_free_bytes": "--cache-min-free-bytes",
    "cache_lease_seconds": "--cache-lease",
    "file_sources": "--file-sources",
    "drain_seconds": "--drain",
    "log_level": "--log-level",
    "metrics_port": "--metrics-port",
    "log_format": "--log-format",
    "traces": "--traces",
    "not_ready_seconds": "--not-ready",
}
"""The flag of each setting, in the order in which they are shown."""


def load_settings(flags: Mapping[str, str | None]) -> ServerSettings:
    """The settings out of flags (by field name; None is not given) and the environment.

    Raises:
        SettingError: names the setting, its value, the rule and what to do.
    """
    fields = ServerSettings.model_fields
    given: dict[str, Any] = {str(fields[name].alias): value for name, value in flags.items() if value is not None}
    try:
        return ServerSettings(**given)
    except ValidationError as error:
        raise SettingError("; ".join(_refusal(str(part["loc"][0]), given) for part in error.errors())) from None


def _refusal(alias: str, given: Mapping[str, str]) -> str:
    name, field = next((name, field) for name, field in ServerSettings.model_fields.items() if field.alias == alias)
    default = str(field.get_default(call_default_factory=True)).removesuffix(".0")
    if alias in given:
        return (
            f"{FLAGS[name]} {given[alias]!r} is refused: it must be {field.description}; "
            f"give such a value, or leave the flag out for {default}"
        )
    return (
        f"{alias}={os.environ[alias]!r} is refused: it must be {field.description}; "
        f"set it to such a value, or unset it for {default}"
    )
