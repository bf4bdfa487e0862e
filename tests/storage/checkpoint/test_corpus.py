"""The committed seeds of the fuzzer are what their folders say, and a short run of it finds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load

from fuzz.make_corpus import CORPUS, FOLDERS, OUR_CHOICE
from mxcore.safetensors import SafetensorsError, parse_header

ROOT = Path(__file__).resolve().parents[3]
SEEDS = [(folder, name) for folder, seeds in FOLDERS.items() for name in seeds]
WE_REFUSE_MORE = {"no_brace"}  # the format wants a "{" first; safetensors takes blanks before it


def test_the_files_are_those_of_the_script() -> None:
    for folder, seeds in FOLDERS.items():
        there = {file.stem: file.read_bytes() for file in (CORPUS / folder).iterdir()}
        assert there == seeds


@pytest.mark.parametrize(("folder", "name"), SEEDS)
def test_a_seed_is_what_its_folder_says(folder: str, name: str) -> None:
    data = FOLDERS[folder][name]
    if folder == "must_accept":
        assert parse_header(data, len(data)).data_offset <= len(data)
        return
    with pytest.raises(SafetensorsError):
        parse_header(data, len(data))
    if folder == "must_reject" and name not in WE_REFUSE_MORE:
        with pytest.raises((SafetensorError, KeyError)):
            load(data)


def test_where_we_refuse_more_is_in_the_docs() -> None:
    page = (ROOT / "docs" / "explanation" / "storage.md").read_text()
    assert all(f"`{name}`" in page for seeds in FOLDERS.values() for name in seeds)
    assert OUR_CHOICE


def test_a_short_run_finds_nothing() -> None:
    command = [sys.executable, "-m", "fuzz", "--seconds", "2", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing found" in done.stdout
