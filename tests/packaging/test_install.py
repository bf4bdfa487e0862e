"""The wheel in an environment of its own: no torch, no vLLM, no source tree."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from mxserver.wire import install_command

ROOT = Path(__file__).resolve().parent.parent.parent
CLEAN = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "CFLAGS": "-O0",  # a third of the time that -O3 takes
}


def run(*command: str | Path, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    environ = {**CLEAN, "PATH": path} if path else CLEAN
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One build for all: as `make wheel` makes it of what git tracks, and checks it, but for the optimisation.

    TEST_WHEEL names one that is there already, such as `make wheel`'s own.
    """
    if given := os.environ.get("TEST_WHEEL"):
        return Path(given)
    folder = tmp_path_factory.mktemp("wheel")
    made = run(sys.executable, ROOT / "tools" / "make_wheel.py", folder, cwd=ROOT)
    assert made.returncode == 0, made.stderr
    return next(folder.glob("mx_modelexpress-*.whl"))


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has wheels alone, numpy beside them, made where there is no compiler."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    command = (python, "-m", "pip", "install", "-qq", "--only-binary", ":all:", wheel, f"numpy=={version('numpy')}")
    installed = run(*command, cwd=folder, path=str(python.parent))
    assert installed.returncode == 0, installed.stderr
    return python


@pytest.fixture(scope="session")
def oldest(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the oldest release of everything that the package says it works with."""
    folder = tmp_path_factory.mktemp("oldest")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra in ("redis", "otel") for name in project["optional-dependencies"][extra]]
    pinned = [name.replace(">=", "==") for name in project["dependencies"] + extras]
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    installed = run(python, "-m", "pip", "install", "-qq", wheel, *pinned, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return python


def test_without_a_compiler_one_line_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, env={**CLEAN, "CC": "/nonexistent/gcc"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "mx-modelexpress" in line]
    assert line == (
        "mx-modelexpress is compiled, and there is no compiler /nonexistent/gcc: install one "
        "(Debian, Ubuntu: apt-get install gcc libc6-dev; or CC=its path), or install a wheel"
    )
    assert not list(tmp_path.iterdir())


def test_wheel_carries_types_and_no_tests(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    for package in ("mxcore", "mxserver", "vllm_plugin"):
        assert f"{package}/py.typed" in names
    compiled = [name for name in names if name.endswith(".abi3.so")]
    assert compiled
    for name in compiled:
        assert name.replace(".abi3.so", ".pyi") in names
        assert b".debug_info" not in archive.read(name), "symbols are five sixths of a binary"
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "mxbench",
        "mxcore",
        "mxserver",
        "vllm_plugin",
    }


def test_it_runs_on_older_systems_than_this_one(wheel: Path, tmp_path: Path) -> None:
    """No symbol is newer than glibc 2.28, and the digests still find out what the processor has."""
    assert wheel.name == f"mx_modelexpress-0.1.0-cp311-abi3-manylinux_2_28_{platform.machine()}.whl"
    newest = (0, 0)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            for found in re.findall(rb"GLIBC_2\.(\d+)", archive.read(name) if name.endswith(".so") else b""):
                newest = max(newest, (2, int(found)))
    assert (2, 17) <= newest <= (2, 28)


def test_its_digests_use_the_vectors_that_the_processor_has(python: Path, tmp_path: Path) -> None:
    code = "from mxcore.digest import digest as d; print(d._choose_vectors(9), d._choose_mixsum_vectors(9))"
    here = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run(python, "-c", code, cwd=tmp_path).stdout == here.stdout


@contextmanager
def serving(python: Path, folder: Path, *options: str) -> Iterator[tuple[str, str]]:
    """An environment's `mxserver`: where its page is, and host:port. It has to end well."""
    log = folder / "log"
    command = [python.parent / "mxserver", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", *options]
    environ = {**CLEAN, "HF_HUB_CACHE": str(folder / "hub"), "OTEL_SDK_DISABLED": "true"}
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [*command, "--store-path", folder / "state.sqlite3"], stderr=stderr, env=environ, cwd=folder
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := re.findall(r"(?:page|listening) on (\S+)", log.read_text())[:2])[1:]:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield found[0], found[1]
    finally:
        server.terminate()
        assert server.wait(60) == 0


PUBLISHES = """
import sys, numpy
from mxcore import publish
with publish("m", {"a": numpy.arange(300_000)}, 1) as published:
    print(published.endpoint, flush=True)
    sys.stdin.read()
"""
FETCHES = """
import sys
from mxcore import fetch
found = fetch("m", 1, wait_seconds=60)
heavy = [name for name in ("torch", "vllm", "nixl_cu12") if name in sys.modules]
print(int(found["a"].sum()), found.report.bytes, heavy)
"""


def test_publish_and_fetch_between_two_processes_there(python: Path, tmp_path: Path) -> None:
    with serving(python, tmp_path) as (_, address):
        environ = {**CLEAN, "MODEL_EXPRESS_URL": address, "MX_WORKER_HOST": "127.0.0.1"}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [python, "-W", "error", "-c"]
        with subprocess.Popen([*command, PUBLISHES], cwd=tmp_path, env=environ, text=True, **pipes) as publisher:
            reader = subprocess.run(
                [*command, FETCHES], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
            )
            said, errors = publisher.communicate("", timeout=120)
    assert (reader.stdout, reader.stderr) == (f"{sum(range(300_000))} 2400000 []\n", "")
    assert (publisher.returncode, errors) == (0, "")
    assert said.startswith("127.0.0.1:")


def test_nixl_without_its_dependencies_will_do(python: Path, tmp_path: Path) -> None:
    """`pip install --no-deps nixl-cu12`: 250 MB instead of 6 GB. Its files are those of the tests' environment."""
    spec = importlib.util.find_spec("nixl_cu12")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    [package] = spec.submodule_search_locations
    for name in (Path(package), Path(package).parent / ".nixl_cu12.mesonpy.libs"):
        (tmp_path / name.name).symlink_to(name)
    code = (
        "import sys; from mxcore.nixl import NixlAgent; agent = NixlAgent('here'); agent.destroy()\n"
        "print([name for name in ('torch', 'nixl_cu12') if name in sys.modules])"
    )
    done = run(python, "-c", f"import sys; sys.path.append({str(tmp_path)!r})\n{code}", cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr


def test_import_without_torch_and_vllm_is_quiet_but_for_the_plugin(python: Path, tmp_path: Path) -> None:
    done = run(python, "-c", "import mxcore, mxserver, vllm_plugin; print(mxserver.__version__)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.1.0"
    said = [line for line in done.stderr.splitlines() if "Warning: " in line]
    assert len(said) == 1
    assert "vllm" in said[0].lower()


def test_the_public_names_are_there_without_torch_and_without_a_hook(python: Path, tmp_path: Path) -> None:
    code = (
        "import sys; before = list(sys.meta_path)\n"
        "from mxcore import open_checkpoint, load_file, publish, fetch\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules], sys.meta_path == before)"
    )
    done = run(python, "-W", "error", "-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[] True\n", "")


def test_compiled_core_works_there(python: Path, tmp_path: Path) -> None:
    code = "import mxcore.digest.digest as d; print(hex(d.xxh3_64(b'')))"
    done = run(python, "-W", "ignore", "-c", code, cwd=tmp_path)
    assert done.stdout.strip() == "0x2d06800538d394c2", done.stderr


def test_server_starts_there(python: Path, tmp_path: Path) -> None:
    done = run(python.parent / "mxserver", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8001" in done.stdout


@pytest.mark.parametrize(("words", "extra"), [(["--store", "redis"], "redis"), (["--traces", "otlp"], "otel")])
def test_check_config_there_names_the_missing_extra(python: Path, tmp_path: Path, words: list[str], extra: str) -> None:
    done = run(python.parent / "mxserver", *words, "--check-config", cwd=tmp_path)
    assert done.returncode == 2
    assert install_command(extra) in done.stderr
    assert "are good" not in done.stderr


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["bench", "--help"], ["models", "get", "--help"]])
def test_mx_there_says_nothing_beside_what_was_asked(python: Path, tmp_path: Path, words: list[str]) -> None:
    done = run(python.parent / "mx", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_mx_bench_there_has_those_of_the_wheel(python: Path, tmp_path: Path) -> None:
    shown = run(python.parent / "mx", "bench", "--help", cwd=tmp_path)
    assert "  compare" in shown.stdout
    (tmp_path / "a.json").write_text('{"bench": "x", "figures": {"a_seconds": 1}}')
    compared = run(python.parent / "mx", "bench", "compare", "a.json", "a.json", cwd=tmp_path)
    assert (compared.returncode, compared.stdout, compared.stderr) == (0, "no change in 1 figures\n", "")
    assert "  storm" in shown.stdout
    refused = run(python.parent / "mx", "bench", "load", "--size-mib", "1", cwd=tmp_path)
    assert refused.returncode == 2
    assert "needs torch: it comes with vLLM" in refused.stderr
    refused = run(python.parent / "mx", "bench", "vllm", cwd=tmp_path)
    assert refused.returncode == 2
    assert "source checkout" in refused.stderr


def test_doctor_there_says_that_nixl_is_missing_and_not_needed(python: Path, tmp_path: Path) -> None:
    done = run(python.parent / "mx", "doctor", "--no-server", "--json", cwd=tmp_path)
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert (done.returncode, done.stderr) == (0, "")
    assert "fail" not in {finding["state"] for finding in findings.values()}
    assert findings["nixl"]["state"] == "note"
    assert findings["nixl"]["fact"].startswith("no usable NIXL library")
    assert findings["nixl backends"]["fact"] == "none: there is no NIXL"


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the oldest pydantic has no wheel for this Python")
def test_oldest_dependencies_will_do(oldest: Path, tmp_path: Path) -> None:
    """A vLLM image keeps what it has: a bound that is too low is a server, or a plugin, that does not start there."""
    with serving(oldest, tmp_path, "--traces", "otlp") as (page, address):
        code = (
            "import redis\nimport vllm_plugin, mxserver.store.redis, mxcore.cli.explain.command\n"
            "from mxcore.settings import load_settings\nfrom mxcore.transfer.member.membership import Membership\n"
            "from mxserver.wire.proto import p2p_pb2\n"
            f"member = Membership(load_settings({{'server_address': {address!r}}}), "
            "p2p_pb2.SourceIdentity(model_name='m'), 0, 'cpu')\n"
            "print(member.join(), member.find_sources(), member.close())"
        )
        joined = run(oldest, "-W", "ignore", "-c", code, cwd=tmp_path)
        assert joined.stdout == "True [] None\n", joined.stderr
        for words in (["status", "--page", page], ["sources"], ["models", "list"]):
            done = run(oldest.parent / "mx", *words, "--server", address, cwd=tmp_path)
            assert (done.returncode, done.stderr) == (0, "")
