"""The entry point: light, idempotent, harmless. In processes of their own, as vLLM runs it.

Those that need vLLM are forked from one that has imported it, which takes 10 s: nothing of the plugin is in it.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from tests.installs import installed

ROOT = Path(__file__).parents[2]
GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")
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


def test_the_entry_points_are_the_functions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {"modelexpress_mx": "vllm_plugin:register", "modelexpress": "vllm_plugin:register_modelexpress"}
    assert project["entry-points"]["vllm.general_plugins"] == named
    assert project["entry-points"]["vllm.endpoint_plugins"] == {"mx_update": "vllm_plugin.route.endpoint:MxEndpoint"}
    found = {point.name: point.value for group in GROUPS for point in entry_points(group=group)}
    assert {**named, "mx_update": "vllm_plugin.route.endpoint:MxEndpoint"}.items() <= found.items()


FORKS = """
import json, os, sys, traceback
from vllm.model_executor import model_loader
assert not [name for name in sys.modules if name.startswith(("vllm_plugin", "mxcore", "modelexpress"))]
for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        for descriptor, name in enumerate(job["files"], 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
        os.environ.update(job["environ"])
        sys.path[:0], sys.path[len(sys.path):] = job["before"], job["after"]
        code = 1
        try:
            exec(job["program"], {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
RunWithVllm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run_with_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunWithVllm]:
    """Runs a program where vLLM is imported; `before` and `after` are folders around those that Python looks into."""
    folder = tmp_path_factory.mktemp("said")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, stderr=log, **pipes)
    with process:

        def run_there(
            program: str, environ: dict[str, str] | None = None, before: Path | None = None, after: Path | None = None
        ) -> subprocess.CompletedProcess[str]:
            number = len(list(folder.iterdir()))
            files = [folder / f"{number}.{name}" for name in ("out", "err")]
            job = {"program": program, "files": list(map(str, files)), "environ": environ or {}}
            job |= {"before": [str(before)] if before else [], "after": [str(after)] if after else []}
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            code = process.stdout.readline()
            assert code, (folder / "log").read_text()[-3000:]
            return subprocess.CompletedProcess(program, int(code), *(file.read_text() for file in files))

        yield run_there


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
    "changed": sorted(name for name, loader in before.items() if once[name] is not loader),
    "same": once == loaders,
    "loader": f"{once['mx'].__module__}.{once['mx'].__name__}",
    "abstract": sorted(once["mx"].__abstractmethods__),
    "imported": sorted({name for name in watched if name in sys.modules} - heavy),
}
from types import SimpleNamespace
from vllm_plugin import loader as of_plugin
prepared = []
of_plugin._config_and_tokenizer = lambda: SimpleNamespace(
    prepare=lambda arguments: prepared.append(arguments.load_format)
)
for name in ("auto", "MX", "mx-source", "mx-target", "modelexpress", "dummy"):
    of_plugin.prepare(SimpleNamespace(load_format=name))
found["prepared"] = prepared
del loaders["modelexpress"]
class Theirs(loaders["auto"]):
    pass
loaders["mx"] = loaders["mx-target"] = Theirs
vllm_plugin.register()
vllm_plugin.register_modelexpress()
of_plugin.prepare(SimpleNamespace(load_format="mx"))  # it is not ours any more
found["free name"] = loaders["modelexpress"].__name__
found["foreign name"] = loaders["mx"].__name__

import os
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
def parsed(value, *given):
    os.environ["VLLM_LOAD_FORMAT"] = value
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return parser.parse_args(["--model", "m", *given]).load_format
found["default format"] = [
    parsed("mx-source"), parsed(" MX-Source "), parsed("mx-source", "--load-format", "auto"),
    parsed("mx-source", "--load-format=dummy"), parsed("safetensors"), parsed("nonsense"), parsed(""),
]

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
def result(run_with_vllm: RunWithVllm) -> subprocess.CompletedProcess[str]:
    return run_with_vllm(PROGRAM)


@pytest.fixture(scope="module")
def found(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr[-3000:]
    answers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answers


def test_registering_is_idempotent_and_takes_no_name_away(
    found: dict[str, Any], result: subprocess.CompletedProcess[str]
) -> None:
    assert found["new"] == ["mx", "mx-source", "mx-target"]
    assert found["changed"] == ["modelexpress"]  # vLLM's own since 0.22, which can only load NVIDIA's package
    assert found["same"]
    assert found["loader"] == "vllm_plugin.loader.MxModelLoader"
    assert found["abstract"] == []
    assert "overwritten" not in result.stderr + result.stdout


def test_only_our_own_formats_have_configuration_and_tokenizer_brought(found: dict[str, Any]) -> None:
    assert found["prepared"] == ["MX", "mx-source", "mx-target", "modelexpress"]


def test_registering_imports_nothing_that_only_loading_needs(found: dict[str, Any]) -> None:
    assert found["imported"] == []


def test_a_free_name_is_taken_and_a_foreign_one_left(found: dict[str, Any]) -> None:
    assert found["free name"] == "MxModelLoader"
    assert found["foreign name"] == "Theirs"


def test_a_name_that_another_package_has_is_one_warning(result: subprocess.CompletedProcess[str]) -> None:
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "belongs to" in line]
    assert len(lines) == 1
    assert "the load format mx, mx-target belongs to __main__ (__main__.Theirs), not to mx-modelexpress" in lines[0]
    assert "VLLM_PLUGINS=modelexpress_mx makes it ours" in lines[0]


def test_the_environment_names_the_load_format_where_the_command_line_does_not(
    found: dict[str, Any], result: subprocess.CompletedProcess[str]
) -> None:
    assert found["default format"] == ["mx-source", "mx-source", "auto", "dummy", "safetensors", "auto", "auto"]
    assert "VLLM_LOAD_FORMAT=nonsense is no load format of this vLLM" in result.stdout + result.stderr


def test_a_core_that_cannot_be_loaded_means_storage(
    found: dict[str, Any], result: subprocess.CompletedProcess[str]
) -> None:
    """The loader itself works without the compiled core: what it delegates to is vLLM's."""
    assert found["without the core"] == ["DefaultModelLoader", "auto"]
    assert "loading from storage, alone" in result.stdout + result.stderr


def test_a_broken_installation_never_ends_vllm(run_with_vllm: RunWithVllm) -> None:
    program = """
import sys
sys.modules["vllm_plugin.loader"] = None
import vllm_plugin
vllm_plugin.register()
print("vLLM goes on")
"""
    result = run_with_vllm(program)
    assert result.stdout.splitlines()[-1] == "vLLM goes on"
    assert result.stderr.count("could not be registered") == 1


def test_a_vllm_without_named_formats_says_how_else(result: subprocess.CompletedProcess[str]) -> None:
    assert "LLM(load_format=vllm_plugin.loader.MxModelLoader)" in result.stdout + result.stderr


OWNERS = """
import json
from vllm_plugin import compat
compat.load_plugins()
from vllm_plugin import formats
from vllm_plugin.load_format_names import LOAD_FORMATS
owners = {name: getattr(compat.loader_of(name), "__module__", None) for name in LOAD_FORMATS}
print(json.dumps([owners, formats.taken()]))
"""
OURS, VLLMS, NVIDIAS = (
    "vllm_plugin.loader",
    "vllm.model_executor.model_loader.modelexpress_loader",
    "modelexpress.engines.vllm.loader",
)


@pytest.fixture(scope="module")
def nvidias_package() -> Path:
    return installed("modelexpress-0.7.0", "modelexpress==0.7.0", "google-crc32c", dependencies=False)


OwnersWith = Callable[..., tuple[dict[str, str | None], dict[str, str], str]]


@pytest.fixture
def owners_with(run_with_vllm: RunWithVllm) -> OwnersWith:
    """Whose the load formats are after vLLM loaded its plugins, which of them are not ours, and what was logged."""

    def owners(plugins: str, **places: Path) -> tuple[dict[str, str | None], dict[str, str], str]:
        ran = run_with_vllm(OWNERS, {"VLLM_PLUGINS": plugins}, **places)
        assert ran.returncode == 0, ran.stderr[-3000:]
        owners, taken = json.loads(ran.stdout.splitlines()[-1])
        return owners, taken, ran.stdout + ran.stderr

    return owners


@pytest.mark.parametrize("plugins", ["modelexpress", "modelexpress_mx", "modelexpress,modelexpress_mx"])
def test_either_name_in_vllm_plugins_registers_everything(plugins: str, owners_with: OwnersWith) -> None:
    owners, taken, log = owners_with(plugins)
    assert owners == dict.fromkeys(owners, OURS)
    assert (taken, "overwritten" in log, "belongs to" in log) == ({}, False, False)


@pytest.mark.parametrize("place", ["before", "after"])
def test_beside_nvidias_package_its_plugin_keeps_what_it_takes(
    nvidias_package: Path, place: str, owners_with: OwnersWith
) -> None:
    """Both have a plugin `modelexpress`, of which vLLM calls one: the last that it finds."""
    owners, taken, log = owners_with("modelexpress,modelexpress_mx", **{place: nvidias_package})
    assert owners == {"mx": NVIDIAS, "mx-source": OURS, "mx-target": OURS, "modelexpress": VLLMS}
    assert taken == {"mx": f"modelexpress 0.7.0 ({NVIDIAS}.MxModelLoader)"}
    assert log.count("the load format mx belongs to modelexpress 0.7.0") == 1


def test_beside_nvidias_package_vllm_plugins_chooses_ours(nvidias_package: Path, owners_with: OwnersWith) -> None:
    owners, taken, log = owners_with("modelexpress_mx", before=nvidias_package)
    assert owners == {"mx": OURS, "mx-source": OURS, "mx-target": OURS, "modelexpress": VLLMS}
    assert (taken, "belongs to" in log) == ({}, False)


AMX = """
import ctypes, torch
import vllm_plugin
vllm_plugin.register()
mask = ctypes.c_ulong()
assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask)) == 0  # arch_prctl, ARCH_GET_XCOMP_PERM
print(torch.cpu._is_amx_tile_supported(), bool(mask.value >> 18 & 1))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86_64's")
def test_tiles_may_be_used_where_vllm_will_use_them(run_with_vllm: RunWithVllm) -> None:
    """vLLM's attention takes AMX wherever torch says that the processor has it, and the kernel gives it to who asks."""
    result = run_with_vllm(AMX)
    assert result.stdout.split() in (["True", "True"], ["False", "False"]), result.stderr
