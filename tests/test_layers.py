"""The plan of docs/explanation/architecture.md: which packages there are, how large, and who may import whom."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_graph import (
    LAYERS,
    ROOT,
    circles,
    dotted,
    exported,
    graph,
    imports,
    is_in,
    modules,
    package_of,
    packages,
    resolved,
    sources,
)

MOST_MODULES = 12
# layer -> what it may import of ours, and of the heavy or engine-bound packages of others
ALLOWED = {
    "mxserver": {"mxserver"},
    "mxcore": {"mxcore", "mxserver.wire"},
    "mxcore/engine": {"mxcore", "mxserver.wire", "torch"},
    "vllm_plugin": {"vllm_plugin", "mxcore", "mxserver.wire", "vllm", "torch"},
}
GUARDED = {
    "mxcore",
    "mxserver",
    "vllm_plugin",
    "vllm",
    "torch",
    "tests",
    "mxbench",
    "nixl",
    "nixl_cu12",
    "nixl_cu13",
}

# Lower ones first: a package imports only what stands before it here.
ORDER = (
    "mxserver.wire",
    "mxserver.wire.stores",
    "mxserver.wire.proto",
    "mxserver.wire.credentials",
    "mxserver.wire.calls",
    "mxserver.wire.files",
    "mxcore.errors",
    "mxcore.metrics",
    "mxcore.native",
    "mxcore.memory",
    "mxcore.digest",
    "mxcore.safetensors",
    "mxcore.process",
    "mxcore.sockets",
    "mxcore.nixl",
    "mxcore.cuda",
    "mxcore.reading",
    "mxcore.storage.checkpoint",
    "mxcore.storage.plan",
    "mxcore.agreement",
    "mxcore.load_ladder",
    "mxcore.settings",
    "mxcore.storage.load",
    "mxcore.storage.remote",
    "mxcore.storage.signed",
    "mxcore.storage.access",
    "mxcore.transfer.layout",
    "mxcore.transfer.route",
    "mxcore.transfer.move",
    "mxcore.transfer.receive",
    "mxcore.transfer.serve",
    "mxcore.transfer.member",
    "mxcore.exchange",
    "mxcore.engine",
    "mxcore.cli",
    "vllm_plugin",
)
AROUND = ("mxcore", "mxserver", "mxcore.storage", "mxcore.transfer")  # packages of packages: they export nothing
LIGHT = (
    "mxcore",
    "mxcore.storage",
    "mxcore.storage.checkpoint",
    "mxcore.storage.plan",
    "mxcore.storage.load",
    "mxcore.storage.access",
)
HEAVY = {"torch", "grpc", "obstore", "numpy", "vllm"}


def allowed_in(path: Path) -> set[str]:
    place = "/".join(path.relative_to(ROOT).parts)
    return ALLOWED[max((name for name in ALLOWED if place.startswith(f"{name}/")), key=len)]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_follow_the_arrows(layer: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for path in sources(layer)
        for found in imports(path)
        if found.module.split(".")[0] in GUARDED
        and not any(
            is_in(f"{found.module}.{found.name}".rstrip("."), allowed) or is_in(found.module, allowed)
            for allowed in allowed_in(path)
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_wire_imports_nothing_else_of_the_server() -> None:
    """A worker imports mxserver.wire alone, so the wire may not pull in the rest of the server."""
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        for path in sources("mxserver/wire")
        for found in imports(path)
        if is_in(found.module, "mxserver") and not is_in(found.module, "mxserver.wire")
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_goes_in_a_circle() -> None:
    """For types neither, nor inside functions; the packages that an import runs on its way count too."""
    found = circles(graph())
    assert not found, "\n".join(" <-> ".join(circle) for circle in found)


def place_in_order(module: str) -> int:
    """Where its package stands in ORDER; the packages around all others stand below everything."""
    return ORDER.index(max((name for name in ORDER if is_in(module, name)), key=len)) if module not in AROUND else -1


def test_no_arrow_runs_up() -> None:
    wrong = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        if module not in AROUND and any(is_in(module, layer) for layer in ("mxcore", "mxserver.wire", "vllm_plugin"))
        for target in targets
        if place_in_order(target) > place_in_order(module)
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_nobody_imports_past_a_package() -> None:
    """Across packages one imports from the package, which says what others use. A layer's own modules are public."""
    wrong = []
    for layer in LAYERS:
        for path in sources(layer):
            for found in imports(path):
                target = resolved(found)
                if target is None or target not in modules() or found.declares:
                    continue
                package = target.rpartition(".")[0]
                if package in LAYERS or is_in(package_of(path), package):
                    continue
                named = found.name if found.module == package else ""
                if named not in exported(package):
                    wrong.append(f"{path.relative_to(ROOT)}:{found.line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_packages_export_what_others_use() -> None:
    """And nothing else: what only tests need they take from the module. mxcore.engine says what any engine may use."""
    used: dict[str, set[str]] = {package: set() for package in packages()}
    for folder in (*LAYERS, "bench", "tools", "fuzz"):
        for path in sources(folder):
            for found in imports(path):
                if found.module in used and not is_in(package_of(path), found.module):
                    used[found.module].add(found.name)
    idle = {
        package: sorted(exported(package) - used[package])
        for package in packages()
        if package not in (*LAYERS, "mxcore.engine") and exported(package) - used[package]
    }
    assert not idle


def folders() -> list[Path]:
    """All folders of the layers and of bench that have modules."""
    return sorted({path.parent for layer in (*LAYERS, "bench") for path in sources(layer)})


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_has_at_most_twelve_modules(folder: Path) -> None:
    """A .pyx counts with its .pxd, .pyi and .h; a .proto with the stubs that are made of it."""
    names = {path.stem for path in folder.iterdir() if path.suffix in {".py", ".pyx"} and path.name != "__init__.py"}
    found = {name.removesuffix("_grpc").removesuffix("_pb2") for name in names}
    assert len(found) <= MOST_MODULES, sorted(found)


def test_every_layer_has_sources() -> None:
    assert all(len(list(sources(layer))) > 2 for layer in LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_files_stay_within_their_size(layer: str) -> None:
    """A .pyx up to 400 lines, a .py up to 500: past that there is a seam to find."""
    most = {".pyx": 400, ".py": 500}
    too_long = {
        str(path.relative_to(ROOT)): lines
        for path in sources(layer)
        if path.suffix in most
        and "_pb2" not in path.name
        and (lines := len(path.read_text().splitlines())) > most[path.suffix]
    }
    assert not too_long


def test_every_compiled_module_has_its_stub() -> None:
    missing = [str(p.relative_to(ROOT)) for p in ROOT.glob("mxcore/**/*.pyx") if not p.with_suffix(".pyi").exists()]
    assert not missing


@pytest.mark.parametrize("package", LIGHT)
def test_importing_storage_loads_nothing_heavy(package: str) -> None:
    code = f"import sys, json, {package}; print(json.dumps(sorted({{n.partition('.')[0] for n in sys.modules}})))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(json.loads(done.stdout))


@pytest.mark.parametrize("module", ["mxcore.cli.main", "mxcore.settings", "mxcore.transfer.member"])
def test_what_knows_no_engine_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'mxcore.engine') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_package_says_what_is_in_it() -> None:
    silent = [dotted(path) for path in packages().values() if not path.read_text().startswith('"""')]
    assert not silent


def test_the_architecture_page_lists_these_packages() -> None:
    spec = importlib.util.spec_from_file_location("make_package_table", ROOT / "tools" / "make_package_table.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.with_table(tool.PAGE.read_text()) == tool.PAGE.read_text(), "run: python tools/make_package_table.py"
