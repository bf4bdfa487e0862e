"""Load formats by name: whose they are here, and which one is taken where a command gives none.

`python -m vllm_plugin.formats` loads vLLM's plugins as vLLM does and prints, as JSON, which of our load formats belong
to somebody else: format -> who. `mx doctor` runs it.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os

from vllm_plugin import compat
from vllm_plugin.load_format_names import LOAD_FORMATS

__all__ = ["default_format", "taken", "warn_of_taken"]

DEFAULT = "VLLM_LOAD_FORMAT"
OURS = "vllm_plugin.loader"  # by name: that module warns by this one

_log = logging.getLogger("vllm.modelexpress")
_warned: set[str] = set()


def taken() -> dict[str, str]:
    """Those of our load formats that another package has: format -> its name, version and class.

    `modelexpress` is left out where it is vLLM's own: it belongs to NVIDIA's package, if that is there.
    """
    owners = {name: compat.loader_of(name) for name in LOAD_FORMATS}
    return {
        name: _described(owner)
        for name, owner in owners.items()
        if owner is not None and owner.__module__ != OURS and not owner.__module__.startswith("vllm.")
    }


def _described(owner: type) -> str:
    package = owner.__module__.partition(".")[0]
    names = importlib.metadata.packages_distributions().get(package, [])
    versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(names))
    return f"{versions or package} ({owner.__module__}.{owner.__qualname__})"


def warn_of_taken() -> None:
    """One line for each package that has load formats of ours, once in a process."""
    found = {name: owner for name, owner in taken().items() if name not in _warned}
    _warned.update(found)
    for owner in dict.fromkeys(found.values()):
        names = ", ".join(name for name in found if found[name] == owner)
        _log.warning(
            "the load format %s belongs to %s, not to mx-modelexpress: VLLM_PLUGINS=modelexpress_mx makes it ours "
            "(name your other plugins there as well); without mx-modelexpress installed, this line ends",
            names,
            owner,
        )


def default_format() -> str | None:
    """What VLLM_LOAD_FORMAT says, where that is a load format of this vLLM; else None, with a line in the log."""
    chosen = os.environ.get(DEFAULT, "").strip().lower()
    if not chosen:
        return None
    if compat.loader_of(chosen) is None:
        _log.warning("%s=%s is no load format of this vLLM, and counts as unset", DEFAULT, chosen)
        return None
    return chosen


def main() -> None:
    """Prints whose the load formats are."""
    compat.load_plugins()
    print(json.dumps(taken()))  # noqa: T201


if __name__ == "__main__":
    main()
