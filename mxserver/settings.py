"""The server's settings: a flag wins over the environment, the environment over the default.

A value that breaks its rule keeps the server from starting. Values that Kubernetes injects for services of the same
name, and empty ones, count as unset.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from mxserver.wire.environment import setting
from mxserver.wire.errors import SettingError

LogLevel = Literal["trace", "debug", "info", "warn", "warning", "error"]
Backend = Literal["sqlite", "memory"]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def default_store_path() -> Path:
    """`mxserver/state.sqlite3` in the user's state folder, by the XDG Base Directory Specification."""
    folder = os.environ.get("XDG_STATE_HOME", "")
    return (Path(folder) if Path(folder).is_absolute() else Path("~/.local/state").expanduser()) / (
        "mxserver/state.sqlite3"
    )


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
    gc_timeout_seconds: Seconds = Field(3600.0, alias="MX_GC_TIMEOUT_SECS", description="a number of seconds greater than 0")

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
    "drain_seconds": "--drain",
    "log_level": "--log-level",
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
