"""The entry point: light, idempotent, harmless. In processes of their own, as vLLM runs it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "vllm", "grpc", "numpy", "transformers", "mxcore", "mxserver")


def run(program: str, *, site: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *([] if site else ["-S"]), "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)


def test_importing_the_package_imports_nothing_heavy() -> None:
    result = run(f"import sys, vllm_plugin; print([name for name in {HEAVY} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr
    assert result.stderr == ""


def test_without_vllm_one_line_says_what_is_missing() -> None:
    result = run("import vllm_plugin; vllm_plugin.register(); print('fine')", site=False)
    assert result.stdout.strip() == "fine"
    first, *rest = result.stderr.splitlines()
    assert "RuntimeWarning: vllm_plugin needs vLLM, which is not installed here" in first
    assert len(rest) <= 2  # the source line, and what register says


def test_the_entry_point_is_the_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"modelexpress_mx": "vllm_plugin:register"}
    installed = [point for point in entry_points(group="vllm.general_plugins") if point.name == "modelexpress_mx"]
    assert [point.value for point in installed] == ["vllm_plugin:register"]


PROGRAM = """
import json, sys
import vllm_plugin
from vllm.model_executor import model_loader
loaders = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
watched = ("grpc", "mxcore.transfer", "nixl_cu12")
heavy = {name for name in watched if name in sys.modules}
before = dict(loaders)
vllm_plugin.register()
once = dict(loaders)
vllm_plugin.register()
found = {
    "new": sorted(set(once) - set(before)),
    "same": once == loaders and all(once[name] is loader for name, loader in before.items()),
    "loader": f"{once['mx'].__module__}.{once['mx'].__name__}",
    "abstract": sorted(once["mx"].__abstractmethods__),
    "imported": sorted({name for name in watched if name in sys.modules} - heavy),
}
del loaders["modelexpress"]
loaders["mx"] = loaders["auto"]
vllm_plugin.register()
found["free name"] = loaders["modelexpress"].__name__
found["foreign name"] = loaders["mx"].__name__

from vllm.config import LoadConfig
from vllm_plugin import compat
for name in ("mxcore.transfer.member.membership", "mxcore.digest"):
    sys.modules[name] = None
loader = once["mx"](LoadConfig(load_format="mx", model_loader_extra_config={"layout": "raw"}))
compat.load_model = lambda loader, *arguments: [type(loader).__name__, loader.load_config.load_format]
found["without the core"] = loader.load_model(None, None)
del model_loader.register_model_loader
vllm_plugin.register()  # as with 0.10.0: a line, no exception
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def result() -> subprocess.CompletedProcess[str]:
    return run(PROGRAM)


@pytest.fixture(scope="module")
def found(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr[-3000:]
    answers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answers


def test_registering_is_idempotent_and_takes_no_name_away(
    found: dict[str, Any], result: subprocess.CompletedProcess[str]
) -> None:
    assert found["new"] == ["mx", "mx-source", "mx-target"]  # vLLM has a modelexpress of its own since 0.22
    assert found["same"]
    assert found["loader"] == "vllm_plugin.loader.MxModelLoader"
    assert found["abstract"] == []
    assert "overwritten" not in result.stderr + result.stdout


def test_registering_imports_nothing_that_only_loading_needs(found: dict[str, Any]) -> None:
    assert found["imported"] == []


def test_a_free_name_is_taken_and_a_foreign_one_left(found: dict[str, Any]) -> None:
    assert found["free name"] == "MxModelLoader"
    assert found["foreign name"] == "DefaultModelLoader"


def test_a_core_that_cannot_be_loaded_means_storage(
    found: dict[str, Any], result: subprocess.CompletedProcess[str]
) -> None:
    """The loader itself works without the compiled core: what it delegates to is vLLM's."""
    assert found["without the core"] == ["DefaultModelLoader", "auto"]
    assert "loading from storage, alone" in result.stdout + result.stderr


def test_a_broken_installation_never_ends_vllm() -> None:
    program = """
import sys
sys.modules["vllm_plugin.loader"] = None
import vllm_plugin
vllm_plugin.register()
print("vLLM goes on")
"""
    result = run(program)
    assert result.stdout.splitlines()[-1] == "vLLM goes on"
    assert result.stderr.count("could not be registered") == 1


def test_a_vllm_without_named_formats_says_how_else(result: subprocess.CompletedProcess[str]) -> None:
    assert "LLM(load_format=vllm_plugin.loader.MxModelLoader)" in result.stdout + result.stderr


AMX = """
import ctypes, torch
import vllm_plugin
vllm_plugin.register()
mask = ctypes.c_ulong()
assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask)) == 0  # arch_prctl, ARCH_GET_XCOMP_PERM
print(torch.cpu._is_amx_tile_supported(), bool(mask.value >> 18 & 1))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86_64's")
def test_tiles_may_be_used_where_vllm_will_use_them() -> None:
    """vLLM's attention takes AMX wherever torch says that the processor has it, and the kernel gives it to who asks."""
    result = run(AMX)
    assert result.stdout.split() in (["True", "True"], ["False", "False"]), result.stderr
