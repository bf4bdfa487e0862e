"""The wheel in an environment of its own: no torch, no vLLM, no source tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CLEAN = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
    "PIP_DISABLE_PIP_VERSION_CHECK": "1"
}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=CLEAN, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git tracks, so that nothing of this tree's own builds gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, names):
        source = ROOT / name
        if source.is_file():
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    built = run(
        sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", folder, tree, cwd=folder
    )
    assert built.returncode == 0, built.stderr
    return next(folder.glob("mx_modelexpress-*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    installed = run(python, "-m", "pip", "install", "-qq", wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return python


def test_wheel_carries_types_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("mxcore", "mxserver", "vllm_plugin"):
        assert f"{package}/py.typed" in names
    compiled = [name for name in names if name.endswith(".abi3.so")]
    assert compiled
    for name in compiled:
        assert name.replace(".abi3.so", ".pyi") in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"mxcore", "mxserver", "vllm_plugin"}


def test_import_without_torch_and_vllm_says_what_is_missing(python: Path, tmp_path: Path) -> None:
    done = run(python, "-c", "import mxcore, mxserver, vllm_plugin; print(mxserver.__version__)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.1.0"
    said = [line for line in done.stderr.splitlines() if "Warning: " in line]
    assert len(said) == 2
    assert "torch" in said[0]
    assert "pip install" in said[0]
    assert "vllm" in said[1].lower()


def test_compiled_core_works_there(python: Path, tmp_path: Path) -> None:
    code = "import mxcore.digest as d; print(hex(d.xxh3_64(b'')))"
    done = run(python, "-W", "ignore", "-c", code, cwd=tmp_path)
    assert done.stdout.strip() == "0x2d06800538d394c2", done.stderr


def test_server_starts_there(python: Path, tmp_path: Path) -> None:
    done = run(python.parent / "mxserver", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8001" in done.stdout


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["bench", "--help"], ["models", "get", "--help"]])
def test_mx_there_says_nothing_beside_what_was_asked(python: Path, tmp_path: Path, words: list[str]) -> None:
    done = run(python.parent / "mx", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_mx_bench_there_says_that_benches_are_not_installed(python: Path, tmp_path: Path) -> None:
    shown = run(python.parent / "mx", "bench", "--help", cwd=tmp_path)
    assert "not installed" in shown.stdout
    refused = run(python.parent / "mx", "bench", "load", cwd=tmp_path)
    assert refused.returncode == 2
    assert "source checkout" in refused.stderr


def test_doctor_there_names_the_missing_nixl_once(python: Path, tmp_path: Path) -> None:
    done = run(python.parent / "mx", "doctor", "--no-server", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert [finding["state"] for finding in findings.values()].count("fail") == 1
    assert findings["nixl"]["fact"].startswith("no usable NIXL library")
    assert findings["nixl backends"]["fact"] == "none: there is no NIXL"
