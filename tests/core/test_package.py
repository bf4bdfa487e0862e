"""The package itself: what its import costs and says, what it says when it is not built, its version and its files."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mxcore
from mxcore import errors

ROOT = Path(__file__).parents[2]
CORE = ROOT / "mxcore"
COMPILED = sorted(".".join(path.relative_to(CORE).with_suffix("").parts) for path in CORE.rglob("*.pyx"))


def run(script: str, *, path: Path = ROOT, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds our packages in `path`."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, *options, "-c", script],
        env=environment,
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert mxcore.__version__ == project["version"]
    assert mxcore.__version__ == importlib.metadata.version(project["name"])


def test_importing_costs_nothing() -> None:
    done = run(
        "import sys; before = set(sys.modules); import mxcore; new = set(sys.modules) - before; "
        "import json; print(json.dumps([*new]))"
    )
    assert done.stderr == ""
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"torch", "numpy", "grpc", "ctypes", "google", "mxserver", "pydantic", "pathlib", "typing"}
    assert not {name for name in json.loads(done.stdout) if name.startswith("mxcore.")}


def test_compiled_modules_load_no_array_package() -> None:
    script = (
        f"import sys\nimport {', '.join(f'mxcore.{name}' for name in COMPILED)}\n"
        "import mxcore.storage.checkpoint.content_digest\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'numpy', 'grpc', 'safetensors'}))"
    )
    done = run(script)
    assert (done.stderr, done.stdout) == ("", "[]\n")


def test_importing_is_quiet_without_torch() -> None:
    done = run("import mxcore; print('imported')", options=("-S", "-W", "error"))
    assert (done.stdout, done.stderr) == ("imported\n", "")


def test_all_is_true_and_lazy() -> None:
    """Each name is there, is looked up once, and is in the stub that gives types."""
    script = (
        "import sys, mxcore\n"
        "assert set(mxcore.__all__) <= set(dir(mxcore))\n"
        "from mxcore import *\n"
        "assert all(globals()[name] is getattr(mxcore, name) for name in mxcore.__all__)\n"
        "assert set(mxcore.__all__) <= vars(mxcore).keys()\n"
        "try:\n    mxcore.nothing\nexcept AttributeError as error:\n    print(error)\n"
        "print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    )
    done = run(script, options=("-W", "error"))
    assert (done.stderr, done.stdout) == ("", "module 'mxcore' has no attribute 'nothing'\n[]\n")
    assert f"__all__ = {json.dumps(mxcore.__all__, indent=4)[:-2]},\n]" in (CORE / "__init__.pyi").read_text()


def test_local_checkpoints_load_nothing_that_stores_and_transfers_need() -> None:
    heavy = ("grpc", "pydantic", "torch", "numpy", "obstore")
    script = f"import sys; from mxcore import load_file, stream; print([n for n in {heavy} if n in sys.modules])"
    done = run(script, options=("-W", "error"))
    assert (done.stderr, done.stdout) == ("", "[]\n")


@pytest.mark.parametrize("init", sorted(CORE.rglob("__init__.py")), ids=lambda init: init.parent.name)
def test_packages_have_what_they_say(init: Path) -> None:
    """`__all__` names what is there."""
    module = importlib.import_module(".".join(init.parent.relative_to(ROOT).parts))
    assert [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)] == []


def test_an_unbuilt_tree_names_the_command(tmp_path: Path) -> None:
    for package in ("mxcore", "mxserver"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    version = re.escape(f"{sys.version_info.major}.{sys.version_info.minor}")
    bare = ("-S", "-W", "ignore")  # an editable install would find the binaries of this tree
    for name in COMPILED:
        done = run(f"import mxcore.{name}", path=tmp_path, options=bare)
        assert done.returncode == 1
        assert re.fullmatch(  # of the module, or of one that its packages need first
            rf"mxcore.errors.NotBuilt: mxcore\.[\w.]+ is not built for Python {version}: "
            r"run `make build`, or `pip install -e .` \[MX_NOT_BUILT\]",
            done.stderr.splitlines()[-1],
        )
    script = (
        "from mxcore.errors import NotBuilt\n"
        "try:\n    from mxcore.digest import digest\nexcept ImportError as error:\n"
        "    print(type(error).__name__, error.name)\n"
        "try:\n    import mxcore.nothing\nexcept ModuleNotFoundError as error:\n    print(error)\n"
        "try:\n    import mxcore.storage.nothing\nexcept ModuleNotFoundError as error:\n    print(error)\n"
    )
    done = run(script, path=tmp_path, options=bare)
    assert done.stdout.splitlines() == [
        "NotBuilt mxcore.digest.digest",
        "No module named 'mxcore.nothing'",
        "No module named 'mxcore.storage.nothing'",
    ]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_modules_have_stubs_that_tell_the_truth(name: str) -> None:
    """All public names of a stub are there, and all public functions and classes are in the stub."""
    module = __import__(f"mxcore.{name}", fromlist=["_"])
    stub = (CORE / f"{name.replace('.', '/')}.pyi").read_text()
    for public, value in vars(module).items():
        if not public.startswith("_") and getattr(value, "__module__", None) == f"mxcore.{name}":
            assert f"def {public}(" in stub or f"class {public}" in stub, public
    for line in stub.splitlines():
        declared = line.partition("(")[0].partition(":")[0]
        if declared.startswith(("def ", "class ")) and "Protocol" not in line:
            assert hasattr(module, declared.split()[1]), declared


def test_error_codes_are_unique_and_drawn() -> None:
    found = [
        value for value in vars(errors).values() if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    classes = [value for value in found if issubclass(value, errors.MxError)]
    codes = [value.code for value in classes]
    assert len(set(codes)) == len(codes)
    for value in classes:
        assert value.code in (errors.__doc__ or "")
        assert value.__name__ in (errors.__doc__ or "")
        assert str(value("what failed")) == f"what failed [{value.code}]"
