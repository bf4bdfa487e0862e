"""The benches as a wheel has them: nothing of the checkout's tests is there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mxbench
from mxcore.cli.bench import bench_modules

PACKAGE = Path(mxbench.__file__).parent
COMMAND = """
import sys
sys.modules["tests"] = None
from mxcore.cli.main import main
main()
"""
IN_THE_CHECKOUT_ALONE = {  # what names `tests`, all of it told in one line or left out with its reason
    "engine/loads.py": ["from tests.vllm.engines import EngineHost"],
    "hostile/readers.py": ["from tests.cuda.stand_in import build"],
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, as site-packages have it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, folder / "mxbench", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(installed: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path.insert(0, {str(installed)!r}); sys.path.insert(1, {str(PACKAGE.parents[1])!r})"
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(installed)}
    command = [sys.executable, "-c", f"{start}\n{code}", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=installed, env=environ)


def test_every_bench_tells_its_options_without_the_tests(installed: Path) -> None:
    for name in sorted(bench_modules()):
        ran = run(installed, COMMAND, "bench", name, "--help")
        assert ran.returncode == 0, ran.stderr
        assert "Usage: " in ran.stdout, name


def test_what_runs_in_a_checkout_alone_says_so(installed: Path) -> None:
    ran = run(installed, COMMAND, "bench", "vllm")
    assert ran.returncode == 2
    assert ran.stderr.strip().splitlines() == [
        "Error: mx bench vllm runs from a source checkout alone: what it measures with is among its tests."
    ]
    asked = "from mxbench.needs import why_no_tests; print(why_no_tests())"
    assert run(installed, asked).stdout == "it is among the tests, and those are in a source checkout alone\n"


def test_nothing_else_names_the_tests() -> None:
    found: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        lines = [line.strip() for line in file.read_text().splitlines()]
        if naming := [line for line in lines if line.startswith(("from tests", "import tests"))]:
            found[str(file.relative_to(PACKAGE))] = naming
    assert found == IN_THE_CHECKOUT_ALONE
