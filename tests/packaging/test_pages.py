"""What the pages name is there: settings, `mx` commands and their options, make's targets, files, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mxcore.cli.main import mx
from tests.transfer.conftest import ROOT

DOCS = ROOT / "docs"
[SETTINGS] = DOCS.rglob("settings.md")
[ERRORS] = DOCS.rglob("errors.md")
BESIDE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in BESIDE), *sorted(DOCS.rglob("*.md"))]
MISSPELT_ON_PURPOSE = {"MX_MODEL_SIGNTURE", "MX_TLS_CA_FIEL"}
NAME = re.compile(r"\b(?:MX|MODEL_EXPRESS)_[A-Z0-9_]*[A-Z0-9]\b(?!_?\*)")
CODE = re.compile(r"`([^`\n]+)`|^ *(mx .*|make .*)$", re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def spoken(page: Path) -> Iterator[str]:
    """What the page shows as code: spans, and lines of blocks that begin with `mx` or `make`."""
    for span, line in CODE.findall(page.read_text()):
        yield (span or line).split("  #")[0].split(" # ")[0].strip()


@each_page
def test_settings_are_those_of_now(page: Path) -> None:
    of_now, removed = SETTINGS.read_text().split("## Names that were settings")
    known = {*NAME.findall(of_now), *NAME.findall(ERRORS.read_text())} | MISSPELT_ON_PURPOSE
    if page == SETTINGS:
        return
    assert set(NAME.findall(page.read_text())) - known == set(), "no such setting or code"
    assert removed


def options_of(command: click.Command) -> set[str]:
    return {"--help"} | {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    for text in spoken(page):
        if not text.startswith("mx ") or "'" in text:
            continue
        words = shlex.split(text.replace("…", ""))[1:]
        command: click.Command = mx
        while words and isinstance(command, click.Group) and re.fullmatch(r"[a-z]+", words[0]):
            found = command.get_command(click.Context(command), words.pop(0))
            assert found is not None, text
            command = found
        ours = words[: words.index("--")] if "--" in words else words
        for option in (word.split("=")[0] for word in ours if re.match(r"--[a-z]", word)):
            assert option in options_of(command), f"{text}: {option}"


@each_page
def test_targets_of_make_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for line in re.findall(r"^([a-z][\w. -]*):(?!=)", makefile, re.MULTILINE) for name in line.split()}
    for text in spoken(page):
        if text.startswith("make "):
            names = [word for word in shlex.split(text)[1:] if "=" not in word]
            assert set(names) <= targets, text


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    for text in spoken(page):
        if re.fullmatch(r"(?:tests|tools|bench|deploy|examples|mxcore|mxserver|vllm_plugin|docs)/[\w./-]+", text):
            assert text.endswith(".sqlite3") or (ROOT / text).exists() or (ROOT / f"{text}.py").exists(), text


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|src=\"([^\"]+)\"", page.read_text())
    for target in (link or source for link, source in targets):
        assert "://" in target or (page.parent / target).exists(), target
