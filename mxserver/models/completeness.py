"""What a model lacks: by the provider's list where it is known, else by the index and the numbers of its shards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from mxserver.models.names import is_weight
from mxserver.models.record import ModelRecord
from mxserver.wire import weight_files

_NUMBERED = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\.[A-Za-z]+)")
_MOST_SHARDS = 10_000


class Missing(NamedTuple):
    """`weights`: what an engine would read and cannot. `others`: what is listed beside, and not there. Sorted."""

    weights: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def missing_files(found: Collection[str], listed: Collection[str] | None, read: Callable[[str], bytes]) -> Missing:
    """Compares what was `found` with the list, None where nobody knows it. `read` gives a found file's bytes."""
    there = set(found)
    known = there | set(listed or ()) | set(_siblings(there))
    # An index that is not here lists nothing.
    chosen = weight_files({name for name in known if name in there or not name.endswith(".json")}, read)
    needed = {*chosen.files, *chosen.missing, *chosen.of_modules} or {name for name in known if is_weight(name)}
    weights = needed - there
    return Missing(tuple(sorted(weights)), tuple(sorted(set(listed or ()) - there - weights)))


def missing_of(record: ModelRecord, root: Path) -> Missing:
    """Of a cached model, below the cache's root. Without its weights, where it was downloaded so."""
    places = {file.path: root / file.place for file in record.files}
    missing = missing_files(places, record.listed, lambda name: places[name].read_bytes())
    if record.has_weights:
        return missing
    return Missing((), tuple(name for name in missing.others if not is_weight(name)))


def hubs_list(repository: Path, commit: str) -> tuple[str, ...] | None:
    """What huggingface_hub (2.4) keeps of the hub's list in its cache; None without it."""
    try:
        text = (repository / "trees" / f"{commit}.json").read_text()
        return tuple(sorted(str(name) for name in json.loads(text)["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _siblings(names: Collection[str]) -> Iterator[str]:
    """The names of all shards of which one is there: model-00001-of-00003.safetensors."""
    for name in names:
        if (match := _NUMBERED.fullmatch(name)) and int(match[4]) <= _MOST_SHARDS:
            yield from (f"{match[1]}{n:05}{match[3]}{match[4]}{match[5]}" for n in range(1, int(match[4]) + 1))


def some(names: Collection[str]) -> str:
    """The first few of them, for a message."""
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
