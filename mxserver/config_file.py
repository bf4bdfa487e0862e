"""The settings file (TOML): reading it, and writing what is in force in the same form."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxserver.wire import SettingError, unknown_key


@dataclass(frozen=True)
class ConfigFile:
    """A file's settings, by the names of `ServerSettings`."""

    path: Path
    values: Mapping[str, Any]


def read_toml(path: Path, what: str, advice: str) -> dict[str, Any]:
    """A TOML file's content. Raises SettingError, which calls the file `what` and says with `advice` what to do."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise SettingError(f"{what} {path} cannot be read ({error.strerror}); {advice}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{what} {path} is not TOML: {error}") from error


def read_config(path: Path, known: Iterable[str]) -> ConfigFile:
    """Reads a file whose keys must be among `known`. Raises SettingError, which names every key that is not."""
    names = tuple(known)
    values = read_toml(path, "settings file", "give one with --config")
    problems = [unknown_key(key, names) for key in values if key not in names]
    problems += [
        f"{key} = {json.dumps(value)} must be a string or a number"
        for key, value in values.items()
        if isinstance(value, bool) and key in names
    ]
    if problems:
        raise SettingError(f"settings file {path}: {'; '.join(problems)}")
    return ConfigFile(path, values)


def as_toml(name: str, value: Any, origin: str) -> str:
    """One line of a settings file, with where the value comes from; a value that is unset is a comment."""
    if value is None or value == ():
        return f"# {name} is unset"
    return f"{name} = {_toml(value)}  # {origin}"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(part) for part in value)}]"
    if isinstance(value, int | float):
        return repr(value)
    # TOML has JSON's escapes, except the surrogate pairs that JSON uses for characters beyond 16 bits.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
