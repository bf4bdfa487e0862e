"""The values of settings: what a text means, which values a setting takes, and defaults that depend on the machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from mxserver.limits import ServerLimits, changed


def lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def format_of_log(value: Any) -> Any:
    """Those of NVIDIA's server that are no JSON are text."""
    value = lower(value)
    return "text" if value in ("pretty", "compact", "full") else value


def absolute(folder: Path) -> Path:
    if not folder.is_absolute():
        raise ValueError("it is not an absolute path")
    return folder


_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP])(i?)B?|B)?", re.IGNORECASE)


def parse_bytes(value: Any) -> Any:
    """Bytes out of `500GiB`, `1.5 TB`, `10G` or a plain number; anything else is passed on, and refused later."""
    match = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return value
    number, prefix, binary = match.groups()
    exponent = "KMGTP".index(prefix.upper()) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** exponent)


def folders(value: Any) -> Any:
    return tuple(folder for folder in value.split(":") if folder) if isinstance(value, str) else value


def listed(value: Any) -> Any:
    """What stands between commas, without blanks and empty entries."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def parsed_limits(value: Any) -> Any:
    """Limits out of `records=5000, stored_bytes=2GiB`, or a list of such pairs."""
    if isinstance(value, ServerLimits):
        return value
    pairs: dict[str, int] = {}
    for part in listed(value) if isinstance(value, str) else value:
        name, _, text = str(part).partition("=")
        number = parse_bytes(text)
        pairs[name.strip()] = int(number) if str(number).strip().isdigit() else -1
    return changed(pairs)


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, lt=2**63)]
BYTES_RULE = "bytes, or a number with KB, MB, GB, TB (or KiB, MiB, GiB, TiB); 0 is no limit"
AbsolutePath = Annotated[Path, AfterValidator(absolute)]
Audience = Annotated[str, Field(pattern=r"^\S+$")]
ServiceAccount = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?:[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Listed = BeforeValidator(listed)
ModelSourceName = Annotated[str, Field(pattern=r"^(\*|[^\s:*]+(/\*)?|(s3|gs|az|abfss)://[^\s*]+)$")]
Seconds = Annotated[float, Field(gt=0, le=10 * 365 * 86400, allow_inf_nan=False)]


def default_store_path() -> Path:
    """`mxserver/state.sqlite3` in the user's state folder, by the XDG Base Directory Specification."""
    folder = os.environ.get("XDG_STATE_HOME", "")
    below = Path(folder) if Path(folder).is_absolute() else _in_home("~/.local/state")
    return below / "mxserver" / "state.sqlite3"


def default_cache_directory() -> Path:
    """`huggingface/hub` in `~/.cache`, or where HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME say: the hub's own folder."""
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if folder := os.environ.get(name):
            return _in_home(os.path.expandvars(folder)) / below
    return _in_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _in_home(path: str) -> Path:
    """The path with its "~" replaced. Without HOME and without an entry in the password database (a user id that a
    cluster made up) the home is "/", as container runtimes set it: who needs a folder there hears what to set."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path("/") / path.partition("/")[2]
