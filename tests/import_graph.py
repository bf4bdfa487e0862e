"""Who imports whom in this project, read from the sources: .py, .pyi and .pyx, for types and inside functions too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("mxcore", "mxserver", "vllm_plugin")
_COMPILED_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+(c?import)[ \t]+(\([^)]*\)|[^\n#(]+)|(c?import)[ \t]+([\w., ]+))", re.MULTILINE
)


class Import(NamedTuple):
    """One name that a file takes from a module, or the module itself (`name` is empty)."""

    line: int
    module: str
    name: str
    declares: bool = False  # Cython's cimport: declarations of C, nothing is run


def sources(folder: str) -> Iterator[Path]:
    """The files of ours below a folder that import anything."""
    yield from sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".pyx", ".pyi"})


def dotted(path: Path) -> str:
    """The module's name; a package's for its `__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(path: Path) -> str:
    """The package that the file lies in."""
    return ".".join(path.relative_to(ROOT).parts[:-1])


def is_in(module: str, package: str) -> bool:
    """Whether it is the package itself or anything below it."""
    return module == package or module.startswith(package + ".")


@cache
def modules() -> Mapping[str, Path]:
    """All modules of the layers, without packages' `__init__`."""
    return {dotted(p): p for layer in LAYERS for p in sources(layer) if p.suffix != ".pyi" and p.name != "__init__.py"}


@cache
def packages() -> Mapping[str, Path]:
    """All packages of the layers: their `__init__`."""
    return {dotted(p): p for layer in LAYERS for p in sources(layer) if p.name == "__init__.py"}


@cache
def exported(package: str) -> frozenset[str]:
    """The names in the package's `__all__`."""
    for node in ast.parse(packages()[package].read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """What the file imports, whatever it is."""
    if path.suffix == ".pyx":
        return tuple(_compiled_imports(path.read_text()))
    found: list[Import] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative imports are not used here"
            found += [Import(node.lineno, node.module or "", alias.name) for alias in node.names]
    return tuple(found)


def _compiled_imports(text: str) -> Iterator[Import]:
    for match in _COMPILED_IMPORT.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        source, kind, names, plain_kind, plain = match.groups()
        for name in (names or plain).strip("() \n").split(","):
            if word := name.split(" as ")[0].strip():
                yield Import(line, source or word, word if source else "", (kind or plain_kind) == "cimport")


def resolved(found: Import) -> str | None:
    """The module or package of ours that is meant, whatever the import is written like."""
    for name in (f"{found.module}.{found.name}", found.module):
        if name in modules() or name in packages():
            return name
    return None


def graph() -> dict[str, set[str]]:
    """Module → what its import runs or its types name. Whoever imports a module runs the packages around it first."""
    edges: dict[str, set[str]] = {name: set() for name in (*modules(), *packages())}
    for layer in LAYERS:
        for path in sources(layer):
            if path.name == "__init__.pyi":  # the types of what a package looks up when it is used: nothing runs by it
                continue
            node = dotted(path)
            for found in imports(path):
                target = resolved(found)
                if target is None or target == node:
                    continue
                edges[node].add(target)
                parts = target.split(".")
                around = {".".join(parts[:count]) for count in range(1, len(parts))} | {found.module} & set(packages())
                edges[node] |= {package for package in around if not is_in(node, package)}
    return edges


def circles(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in edges.get(node, ()):
            if target not in order:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], order[target])
        if low[node] == order[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in edges:
        if node not in order:
            visit(node)
    return found
