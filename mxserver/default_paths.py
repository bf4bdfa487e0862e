"""Where the server keeps its state and its models unless it is told: folders of the user's home."""

from __future__ import annotations

import os
from pathlib import Path


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
