"""The layer arrows of docs/ARCHITECTURE.md: engine → core → control plane, one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mxcore", "mxserver", "vllm_plugin")
# package -> what it may import of ours and of the heavy or engine-bound third parties; a package in another has its own
ALLOWED = {
    "mxserver": {"mxserver"},
    "mxcore": {"mxcore", "mxserver.wire"},
    "mxcore/engine": {"mxcore", "mxserver.wire", "torch"},
    "vllm_plugin": {"vllm_plugin", "mxcore", "mxserver.wire", "vllm", "torch"},
}
FORBIDDEN = {"mxcore": "mxcore.engine"}  # of what it may import
GUARDED = {"mxcore", "mxserver", "vllm_plugin", "vllm", "torch", "tests", "bench", "nixl", "nixl_cu12", "nixl_cu13"}


def sources(package: str) -> Iterator[Path]:
    yield from sorted(p for p in (ROOT / package).rglob("*") if p.suffix in {".py", ".pyx", ".pyi"})


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    if path.suffix == ".pyx":
        for number, line in enumerate(path.read_text().splitlines(), 1):
            words = line.split()
            if len(words) > 1 and words[0] in {"import", "from", "cimport"}:
                yield number, words[1].rstrip(",")
        return
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(allowed + ".")


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_arrows(package: str) -> None:
    inner = [ROOT / other for other in ALLOWED if other.startswith(f"{package}/")]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources(package)
        if not any(path.is_relative_to(other) for other in inner)
        for line, module in imported_modules(path)
        if module.split(".")[0] in GUARDED
        and (
            not any(within(module, allowed) for allowed in ALLOWED[package])
            or within(module, FORBIDDEN.get(package, "-"))
        )
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["mxcore", "mxcore.cli.main", "mxcore.storage", "mxcore.transfer.member.membership"])
def test_what_knows_no_engine_loads_no_torch(module: str) -> None:
    program = f"import sys, {module}; print([name for name in ('torch', 'mxcore.engine') if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_wire_imports_nothing_else_of_the_server() -> None:
    """A worker imports mxserver.wire alone, so the wire may not pull in the rest of the server."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources("mxserver/wire")
        for line, module in imported_modules(path)
        if within(module, "mxserver") and not within(module, "mxserver.wire")
    ]
    assert not wrong, "\n".join(wrong)


def test_every_package_has_sources() -> None:
    assert all(len(list(sources(package))) > 2 for package in PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_files_stay_within_their_room(package: str) -> None:
    """A .pyx up to 400 lines, a .py up to 500: past that there is a seam to find."""
    rooms = {".pyx": 400, ".py": 500}
    outgrown = {
        str(path.relative_to(ROOT)): lines
        for path in sources(package)
        if path.suffix in rooms
        and "_pb2" not in path.name
        and (lines := len(path.read_text().splitlines())) > rooms[path.suffix]
    }
    assert not outgrown


def test_every_compiled_module_has_its_stub() -> None:
    missing = [str(p.relative_to(ROOT)) for p in ROOT.glob("mxcore/**/*.pyx") if not p.with_suffix(".pyi").exists()]
    assert not missing
