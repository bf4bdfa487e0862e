"""Opening libcufile: found, refused, missing; the table's types. Each in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mxcore.reading import cufile
from tests.cuda.stand_in import ROOT, SOURCES, StandIn
from tests.cuda.test_driver import HEADERS, run


def test_importing_opens_nothing_and_a_missing_library_says_where_it_was_looked_for() -> None:
    ran = run("""
import mxcore.reading.cufile as cufile
from mxcore.errors import CuFileMissing
assert "libcufile" not in open("/proc/self/maps").read()
cufile.CANDIDATES = ("libcufile_of_nobody.so.0",)
cufile.candidates = lambda: [*cufile.CANDIDATES, "/nowhere/libcufile.so.0"]
try:
    cufile.version()
except CuFileMissing as error:
    assert error.code == "MX_CUFILE_MISSING"
    assert "libcufile_of_nobody.so.0" in str(error) and "nvidia-cufile" in str(error), error
else:
    raise AssertionError
""")
    assert ran.returncode == 0, ran.stderr


def test_wheels_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [tmp_path / name / "lib/libcufile.so.0" for name in ("nvidia/cufile", "nvidia/cu13")]
    for place in places:
        place.parent.mkdir(parents=True)
        place.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert cufile.candidates() == [*cufile.CANDIDATES, *map(str, places)]


def test_the_stand_in_and_the_library_are_never_taken_for_each_other(loaded: StandIn) -> None:
    ran = run(f"""
import mxcore.reading.cufile as cufile
from mxcore.errors import CuFileMissing
cufile.candidates = lambda: [{str(loaded.path)!r}]
try:
    cufile.load_library()
except CuFileMissing as error:
    assert "stand-in, not libcufile" in str(error), error
try:
    cufile._load_stand_in("libm.so.6")
except CuFileMissing as error:
    assert "is no stand-in" in str(error), error
    print("both refused")
""")
    assert ran.stdout == "both refused\n", ran.stderr


def test_a_missing_symbol_is_named(tmp_path: Path) -> None:
    source, library = tmp_path / "old.c", tmp_path / "libcufile.so.0"
    source.write_text("long cuFileDriverOpen(void) { return 0; }\nlong cuFileDriverClose_v2(void) { return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    ran = run(f"""
import mxcore.reading.cufile as cufile
from mxcore.errors import CuFileMissing
cufile.candidates = lambda: [{str(library)!r}]
try:
    cufile.load_library()
except CuFileMissing as error:
    assert "cuFileUseCount" in str(error) and "older than 1.14" in str(error), error
else:
    raise AssertionError
""")
    assert ran.returncode == 0, ran.stderr


def test_every_function_has_the_type_that_cufile_h_says() -> None:
    wheels = [place.parent for folder in sys.path for place in Path(folder).glob("nvidia/*/include/cufile.h")]
    cuda = next((folder for folder in HEADERS if (folder / "cuda.h").is_file()), None)
    ours = next((folder for folder in [*HEADERS, *wheels] if (folder / "cufile.h").is_file()), None)
    compiler = shutil.which("cc")
    if cuda is None or ours is None or compiler is None:
        pytest.skip("no cuda.h and cufile.h on this machine: the table's types are compared where these headers are")
    command = [compiler, "-std=gnu11", "-fsyntax-only", f"-I{ROOT / 'mxcore'}", f"-I{cuda}", f"-I{ours}"]
    ran = subprocess.run([*command, str(SOURCES / "cufile_matches.c")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
