"""The server's settings: a flag wins over the environment, the environment over the file, the file over the default.

A value that breaks its rule keeps the server from starting. Values that Kubernetes injects for services of the same
name, and empty ones, count as unset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from mxserver.config_file import ConfigFile, as_toml, read_config
from mxserver.limits import DEFAULT, ServerLimits
from mxserver.setting_values import (
    BYTES_RULE,
    AbsolutePath,
    Audience,
    Bytes,
    Listed,
    ModelSourceName,
    Seconds,
    ServiceAccount,
    default_cache_directory,
    default_store_path,
    folders,
    format_of_log,
    listed,
    lower,
    parsed_limits,
)
from mxserver.wire import VARIABLES, SettingError, setting, unprotected
from mxserver.wire.credentials import ServerTls

LogLevel = Literal["trace", "debug", "info", "warn", "warning", "error"]
LogFormat = Literal["text", "json"]
Traces = Literal["off", "otlp"]
Backend = Literal["sqlite", "redis", "memory"]
Auth = Literal["off", "file", "kubernetes"]
MetricsTls = Literal["auto", "off"]


DEFAULT_METRICS_PORT = 9401
DEFAULT_FILES_PORT = 8002


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
    metrics_port: Annotated[Annotated[int, Field(ge=0, le=65535)] | Literal["off"] | None, BeforeValidator(lower)] = (
        Field(
            None,
            alias="MODEL_EXPRESS_SERVER_METRICS_PORT",
            description="a whole number from 0 to 65535, or off",
        )
    )
    files_port: Annotated[Annotated[int, Field(ge=0, le=65535)] | Literal["off"] | None, BeforeValidator(lower)] = (
        Field(None, alias="MX_SERVER_FILES_PORT", description="a whole number from 0 to 65535, or off")
    )
    metrics_hosts: Annotated[tuple[str, ...], NoDecode, Listed] = Field(
        (), alias="MX_SERVER_METRICS_HOSTS", description="host names, separated by ','; * is any"
    )
    metrics_tls: Annotated[MetricsTls, BeforeValidator(lower)] = Field(
        "auto", alias="MX_SERVER_METRICS_TLS", description="auto or off"
    )
    log_format: Annotated[LogFormat, BeforeValidator(format_of_log)] = Field(
        "text", alias="MODEL_EXPRESS_LOG_FORMAT", description="text or json"
    )
    traces: Annotated[Traces, BeforeValidator(lower)] = Field("off", alias="MX_TRACES", description="off or otlp")
    not_ready_seconds: float = Field(
        0.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        alias="MX_SERVER_NOT_READY_SECS",
        description="a number of seconds from 0 to 3600",
    )
    log_level: Annotated[LogLevel, BeforeValidator(lower)] = Field(
        "info", alias="MODEL_EXPRESS_LOG_LEVEL", description="debug, info, warning or error (or trace, warn)"
    )
    store: Annotated[Backend, BeforeValidator(lower)] = Field(
        "sqlite",
        alias="MX_METADATA_BACKEND",
        description="sqlite, redis or memory (nothing is kept in objects of Kubernetes: sqlite on a volume does for "
        "one server, redis for several)",
    )
    store_path: Path = Field(
        default_factory=default_store_path, alias="MX_STORE_PATH", description="the path of a file, to be made or ours"
    )
    redis_url: str | None = Field(
        None,
        pattern=r"^(rediss?|unix)://\S+$",
        alias="REDIS_URL",
        description="redis://, rediss:// or unix://, with user and password where Redis has them",
    )
    redis_host: str = Field(
        "localhost", pattern=r"^[^\s/@]+$", alias="MX_REDIS_HOST", description="an address or name of a machine"
    )
    redis_port: int = Field(6379, ge=1, le=65535, alias="MX_REDIS_PORT", description="a whole number from 1 to 65535")
    tls_cert_file: Path | None = Field(None, alias="MX_TLS_CERT_FILE", description="the path of a PEM file")
    tls_key_file: Path | None = Field(None, alias="MX_TLS_KEY_FILE", description="the path of a PEM file")
    tls_client_ca_file: Path | None = Field(None, alias="MX_TLS_CLIENT_CA_FILE", description="the path of a PEM file")
    auth: Annotated[Auth, BeforeValidator(lower)] = Field("off", alias="MX_AUTH", description="off, file or kubernetes")
    auth_file: Path | None = Field(None, alias="MX_AUTH_FILE", description="the path of a TOML file")
    auth_audience: Annotated[tuple[Audience, ...], NoDecode, Listed] = Field(
        (), alias="MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES", description="names, separated by ','"
    )
    auth_accounts: Annotated[tuple[ServiceAccount, ...], NoDecode, Listed] = Field(
        (),
        alias="MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS",
        description="namespace:name of service accounts, separated by ','",
    )
    auth_cache_seconds: float = Field(
        60.0,
        ge=0,
        le=86400,
        allow_inf_nan=False,
        alias="MODEL_EXPRESS_SECURITY_CACHE_TTL_SECS",
        description="a number of seconds from 0 to 86400",
    )
    limits: Annotated[ServerLimits, NoDecode, BeforeValidator(parsed_limits)] = Field(
        DEFAULT,
        alias="MX_SERVER_LIMITS",
        description="NAME=NUMBER of limits, separated by ','; those of _bytes take MiB and such",
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
    cache_max_bytes: Bytes = Field(0, alias="MX_CACHE_MAX_BYTES", description=BYTES_RULE)
    cache_min_free_bytes: Bytes = Field(0, alias="MX_CACHE_MIN_FREE_BYTES", description=BYTES_RULE)
    cache_lease_seconds: Seconds = Field(
        30.0, alias="MX_CACHE_LEASE_SECS", description="a number of seconds greater than 0"
    )
    model_sources: Annotated[tuple[ModelSourceName, ...], NoDecode, Listed] = Field(
        (),
        alias="MX_MODEL_SOURCES",
        description="org/*, org/name, s3://bucket, s3://bucket/prefix, az://container@account …, separated by ','",
    )
    file_sources: Annotated[tuple[AbsolutePath, ...], NoDecode, BeforeValidator(folders)] = Field(
        (), alias="MX_FILE_SOURCES", description="absolute paths of folders, separated by ':'"
    )
    download_ignore: Annotated[tuple[str, ...], NoDecode, Listed] = Field(
        ("auto",),
        alias="MX_DOWNLOAD_IGNORE",
        description="patterns of paths between commas; auto is original/*, metal/*, *.bin beside safetensors; none",
    )
    download_allow: Annotated[tuple[str, ...], NoDecode, Listed] = Field(
        (), alias="MX_DOWNLOAD_ALLOW", description="patterns of paths, separated by commas"
    )

    @property
    def effective_redis_url(self) -> str:
        """REDIS_URL, or the one of the host and port."""
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        return self.redis_url or f"redis://{host}:{self.redis_port}/0"

    @property
    def tls(self) -> ServerTls | None:
        """The files for TLS; None where it is off."""
        if self.tls_cert_file is None or self.tls_key_file is None:
            return None
        return ServerTls(self.tls_cert_file, self.tls_key_file, self.tls_client_ca_file)

    @property
    def effective_metrics_port(self) -> int | None:
        """9401 unless set, None if it is off. If the port for calls is a free one (0), this one is too."""
        if self.metrics_port == "off":
            return None
        if self.metrics_port is not None:
            return self.metrics_port
        return DEFAULT_METRICS_PORT if self.port else 0

    @property
    def effective_files_port(self) -> int | None:
        """8002 unless set, None if it is off. If the port for calls is a free one (0), this one is too."""
        if self.files_port == "off":
            return None
        if self.files_port is not None:
            return self.files_port
        return DEFAULT_FILES_PORT if self.port else 0

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and environment, without the values that Kubernetes puts under our names."""
        if isinstance(env_settings, EnvSettingsSource):
            env_settings.env_vars = {
                name: value for name in env_settings.env_vars if (value := setting(os.environ, name)) is not None
            }
        return init_settings, env_settings


FIELDS = {str(field.alias): name for name, field in ServerSettings.model_fields.items()}
"""The field of each environment name."""

FLAGS = {FIELDS[variable.name]: variable.flag.partition(" ")[0] for variable in VARIABLES if variable.flag}
"""The flag of each setting, in the order in which they are shown."""


class OtherName(NamedTuple):
    """An environment name that NVIDIA's server has for a setting of ours, and what its values are here."""

    field: str
    values: Mapping[str, str]  # empty: any value, as it is

    @property
    def rule(self) -> str:
        """What its value must be."""
        return " or ".join(self.values) if self.values else str(ServerSettings.model_fields[self.field].description)


OTHER_NAMES = {
    "MODEL_EXPRESS_SECURITY_MODE": OtherName("auth", {"off": "off", "enforce": "kubernetes"}),
}
_MODE, _ACCOUNTS, _AUDIENCES = (
    "MODEL_EXPRESS_SECURITY_MODE",
    "MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS",
    "MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES",
)
_METRICS_PORT = "MODEL_EXPRESS_SERVER_METRICS_PORT"


def config_of(flag: str | None) -> ConfigFile | None:
    """The settings file of --config; None without one. Raises SettingError."""
    return None if flag is None else read_config(Path(flag), ServerSettings.model_fields)


def as_config(settings: ServerSettings, origins: Origins) -> list[str]:
    """The settings in force as lines of a settings file, each with its origin, without passwords."""
    lines = []
    for name in FLAGS:
        value = getattr(settings, name)
        if isinstance(value, ServerLimits):
            value = value.as_settings()
        lines.append(
            as_toml(name, shown(name, value) if value is not None and name in SECRET else value, origins[name])
        )
    return lines


SECRET = ("redis_url",)
"""Settings that may contain a password, and are never shown whole."""


class Origins(dict[str, str]):
    """Where the value of each field comes from: its flag, its environment name, the file, or "default"."""


def load_settings(flags: Mapping[str, str | None], file: ConfigFile | None = None) -> ServerSettings:
    """The settings out of flags (by field name; None is not given), the environment, and the file.

    Raises:
        SettingError: names the setting, its value, the rule and what to do.
    """
    return load_with_origins(flags, file)[0]


def load_with_origins(
    flags: Mapping[str, str | None], file: ConfigFile | None = None
) -> tuple[ServerSettings, Origins]:
    """As `load_settings`, and where each value comes from."""
    if reason := unprotected(os.environ):
        raise SettingError(reason)
    given: dict[str, Any] = {}
    origins = Origins()
    other = _by_other_names()
    for name, field in ServerSettings.model_fields.items():
        alias = str(field.alias)
        if flags.get(name) is not None:
            given[alias], origins[name] = flags[name], FLAGS[name]
        elif setting(os.environ, alias) is not None:
            origins[name] = alias
        elif name in other:
            origins[name], given[alias] = other[name]
        elif file is not None and name in file.values:
            given[alias], origins[name] = file.values[name], str(file.path)
        else:
            origins[name] = "default"
    if origins["metrics_port"] == _METRICS_PORT and setting(os.environ, _METRICS_PORT) == "0":
        given[_METRICS_PORT] = "off"  # as manifests mean it; a free port is of use only to who reads the log
    try:
        settings = ServerSettings(**given)
    except ValidationError as error:
        aliases = dict.fromkeys(str(part["loc"][0]) for part in error.errors())
        raise SettingError("; ".join(_refusal(alias, given, origins) for alias in aliases)) from None
    _require_agreement(settings, other, origins)
    _require_whole(settings)
    _require_protection(settings, other.get("auth", ("", ""))[1])
    return settings, origins


def _by_other_names() -> dict[str, tuple[str, str]]:
    """Field -> the other name that is set, and its value in our words. Raises SettingError."""
    found = {}
    for name, other in OTHER_NAMES.items():
        value = setting(os.environ, name)
        if value is None:
            continue
        if other.values and value.lower() not in other.values:
            raise SettingError(f"{name}={value!r} is refused: it must be {other.rule}; set it to one, or unset it")
        found[other.field] = (name, other.values[value.lower()] if other.values else value)
    return found


def _require_agreement(settings: ServerSettings, other: Mapping[str, tuple[str, str]], origins: Origins) -> None:
    """Raises SettingError where two names of one setting say different things, and one of them would be ignored."""
    for field, (name, value) in other.items():
        meant = listed(value) if isinstance(getattr(settings, field), tuple) else value
        alias = str(ServerSettings.model_fields[field].alias)
        if origins[field] == alias and getattr(settings, field) != meant:
            raise SettingError(
                f"{alias}={setting(os.environ, alias)!r} and {name}={setting(os.environ, name)!r} say different things "
                "of one setting; unset one of them"
            )


def shown(name: str, value: object) -> str:
    """A value for messages, without the password that it may contain."""
    text = str(value)
    return _PASSWORD.sub(r"\1\2***", text) if name in SECRET else text


_PASSWORD = re.compile(r"(://[^/]*?:)[^/]*(?=@)|([?&]password=)[^&]*")


def _refusal(alias: str, given: Mapping[str, Any], origins: Origins) -> str:
    name, field = next((name, field) for name, field in ServerSettings.model_fields.items() if field.alias == alias)
    default = str(field.get_default(call_default_factory=True)).removesuffix(".0")
    value = shown(name, given[alias] if alias in given else os.environ[alias])
    rule = f"is refused: it must be {field.description}"
    if origins[name] == FLAGS[name]:
        return f"{FLAGS[name]} {value!r} {rule}; give such a value, or leave the flag out for {default}"
    if origins[name] in OTHER_NAMES:
        return f"{origins[name]}={value!r} {rule}; set it to such a value, or unset it for {default}"
    if origins[name] == alias:
        return f"{alias}={value!r} {rule}; set it to such a value, or unset it for {default}"
    return f"{name} = {value!r} in {origins[name]} {rule}; give such a value, or take the line out for {default}"


def _require_whole(settings: ServerSettings) -> None:
    """Raises SettingError for settings that only make sense together."""
    if (settings.tls_cert_file is None) != (settings.tls_key_file is None):
        raise SettingError("--tls-cert and --tls-key belong together; give both or none")
    if settings.tls_client_ca_file is not None and settings.tls is None:
        raise SettingError(
            "--tls-client-ca asks clients for certificates, which needs --tls-cert and --tls-key as well"
        )
    if settings.auth == "file" and settings.auth_file is None:
        raise SettingError("--auth file needs --auth-file, which says who has which role")
    if settings.auth == "off" and settings.auth_file is not None:
        raise SettingError(
            "--auth-file has no effect without --auth file or --auth kubernetes; give one, or leave it out"
        )


def _require_protection(settings: ServerSettings, mode: str) -> None:
    """Raises SettingError where tokens of Kubernetes would not be judged as asked.

    `mode` is MODEL_EXPRESS_SECURITY_MODE in our words; empty where that is unset.
    """
    lists = {_ACCOUNTS: settings.auth_accounts, _AUDIENCES: settings.auth_audience}
    if mode == "kubernetes" and settings.auth != mode:
        raise SettingError(
            f"{_MODE}=enforce and --auth {settings.auth} say different things; unset the one, or leave the other out"
        )
    if mode == "kubernetes" and not all(lists.values()):
        raise SettingError(
            f"{_MODE}=enforce needs {' and '.join(lists)}: who may call, as namespace:name separated by ',', and whom "
            f"their tokens are for. Set {' and '.join(name for name, value in lists.items() if not value)}, or unset "
            f"{_MODE} for --auth"
        )
    if settings.auth == "kubernetes" and settings.auth_file is None and not settings.auth_accounts:
        raise SettingError(
            "--auth kubernetes needs --auth-file, which says who has which role, or --auth-accounts, who may call"
        )
    if settings.auth != "kubernetes" and any(lists.values()) and mode != "off":
        raise SettingError(
            f"{' and '.join(name for name, value in lists.items() if value)} would have no effect: no token of "
            f"Kubernetes is asked for. Set {_MODE}=enforce, or {_MODE}=off to leave the server open"
        )
