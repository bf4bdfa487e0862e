"""What error texts and docs say to install can be installed: a path of this checkout, or packages that exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from mxserver.wire.extras import EXTRAS, install_command

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HINT = re.compile(r"pip install ((?:[-\w\[\],.=<>]+|'[^']+'|\{[^}]+\})(?: +(?:[-\w\[\],.=<>/*]+|'[^']+'))*)")
READ = [
    ROOT / "README.md",
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "deploy").rglob("Dockerfile*"),
    *(ROOT / "deploy").rglob("*.yaml"),
] + [path for package in ("mxcore", "mxserver", "vllm_plugin") for path in (ROOT / package).rglob("*.py")]
ENGINES = {"vllm"}  # the user's own; tests run its CPU build, which has another name


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=~! ;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def known_names() -> set[str]:
    listed = [
        *PROJECT["dependencies"],
        *(name for names in PROJECT["optional-dependencies"].values() for name in names),
    ]
    pinned = [line for file in (ROOT / "requirements").glob("*.txt") for line in file.read_text().splitlines()]
    return {name_of(line) for line in [*listed, *pinned] if line and not line.startswith("#")} | ENGINES


def hints() -> list[tuple[str, str]]:
    """(file, words after `pip install`), of all texts, also where they go on in the next line."""
    found = []
    for path in READ:
        text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())  # a string in several lines
        text = re.sub(r"(pip install)\s*\n\s*", r"\1 ", text)
        found += [(str(path.relative_to(ROOT)), match[1]) for match in HINT.finditer(text)]
    return found


def unknown(words: str) -> list[str]:
    """What of `pip install WORDS` nobody can install; words of a sentence that goes on are none of them."""
    parts = shlex.split(words)
    if parts[0].startswith("-"):
        parts = [part for part in parts if not part.startswith("--")]
        parts = parts[1:] if parts[0] == "-e" else parts
    first = parts[0].rstrip(".,") or "."
    if first.startswith((".", "{", "wheels/")):  # this checkout, a name that the program fills in, a folder of wheels
        extras = re.findall(r"[\w-]+", first.partition("[")[2])
        return [extra for extra in extras if extra not in PROJECT["optional-dependencies"]]
    return [] if name_of(first) in known_names() else [first]


def test_every_hint_can_be_followed() -> None:
    found = hints()
    assert len(found) > 8, "the texts are found"
    assert [(file, words, bad) for file, words in found if (bad := unknown(words))] == []


@pytest.mark.parametrize("words", ["mx-modelexpress[s3]", "'mx-modelexpress[otel]'", ".[s4]", "nixl-cu99", "-e .[x]"])
def test_what_nobody_can_install_is_found(words: str) -> None:
    [match] = HINT.findall(f"install it with pip install {words}")
    assert unknown(match)


def test_what_error_texts_name_is_what_the_extras_bring() -> None:
    brought = {name: tuple(listed) for name, listed in PROJECT["optional-dependencies"].items() if name in EXTRAS}
    assert brought == EXTRAS
    assert set(PROJECT["optional-dependencies"]) - set(EXTRAS) == {"vllm", "nixl", "dev"}
    assert install_command("redis") == "pip install 'redis[hiredis]>=5'"
