"""The layer arrows of docs/ARCHITECTURE.md: engine → core → control plane, one direction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mxcore", "mxserver", "vllm_plugin")
# package -> what it may import of ours and of the heavy or engine-bound third parties
ALLOWED = {
    "mxserver": {"mxserver"},
    "mxcore": {"mxcore", "mxserver.wire"},
    "vllm_plugin": {"vllm_plugin", "mxcore", "mxserver.wire", "vllm", "torch"},
}
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


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_arrows(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources(package)
        for line, module in imported_modules(path)
        if module.split(".")[0] in GUARDED and not any(within(module, allowed) for allowed in ALLOWED[package])
    ]
    assert not wrong, "\n".join(wrong)


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
