"""Builds the core under AddressSanitizer and UndefinedBehaviorSanitizer, apart from the tree, and runs something on it.

    python tools/sanitize.py tests [pytest arguments]     tests/core, tests/storage and tests/cuda, with leak detection
    python tools/sanitize.py fuzz [fuzz arguments]        python -m fuzz

Needs gcc with its libasan. The interpreter and torch are not ours and leak at their end: only what has a frame of
mxcore in its stack counts as a leak. Stacks are taken by frame pointers, which our code has: a leak made on purpose in
the core is found by its line, and all tests run in about a minute (unwinding by tables took 15 times as long).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitized"
TREE = BUILD / "tree"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
COPIED = ("tests", "fuzz", "bench", "docs", "pyproject.toml")
# What starts other programs, or looks at the tree itself, says nothing about memory here.
LEFT_OUT = (
    "core/test_package.py",
    "storage/test_vllm_layers.py",
    "storage/test_bench_load.py",
    "cuda/test_ptx.py",
    "cuda/test_driver.py",
    "cuda/test_cufile_library.py",
    "cuda/test_bench_gpu.py",
    "cuda/test_doctor_cuda.py",
    "cuda/test_transfer.py",
    "cuda/test_slim_nixl.py",
)
LEFT_OUT_TESTS = ("tests/cuda/transfer/test_same_device.py::test_weights_on_one_machine",)  # NIXL


def build() -> None:
    """The packages, compiled with the flags, and the tests beside them."""
    environment = {**os.environ, "CFLAGS": FLAGS}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD / "base"), "--build-lib", str(TREE)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for name in COPIED:
        source, copy = ROOT / name, TREE / name
        if source.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, copy)
    for header in (ROOT / "mxcore").rglob("*.h"):  # for the stand-in driver, which the tests compile
        copy = TREE / header.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy2(header, copy)


def library(name: str) -> str:
    """A run-time library of the compiler."""
    found = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"gcc has no {name}: install its sanitizer libraries (libgcc-*-dev)")
    return found


def run(command: list[str]) -> int:
    """Runs it on the sanitized tree; its exit code, or 1 if something of ours leaked."""
    reports = BUILD / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": f"detect_leaks=1:log_path={reports}/asan:detect_stack_use_after_return=0",
        "LSAN_OPTIONS": "exitcode=0:fast_unwind_on_malloc=1:print_suppressions=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "CFLAGS": FLAGS,  # for the stand-in driver, which the tests compile
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(TREE),
        "OMP_NUM_THREADS": "1",
    }
    code = subprocess.run([sys.executable, *command], cwd=TREE, env=environment).returncode
    return code or leaks(reports)


def leaks(reports: Path) -> int:
    """Prints what sanitizers said about code of ours; 1 if there is something."""
    ours = [
        block
        for report in sorted(reports.iterdir())
        for block in report.read_text(errors="replace").split("\n\n")
        if "mxcore" in block and ("leak of" in block or "ERROR" in block)
    ]
    print(*ours, f"{len(ours)} leaks of ours", sep="\n")
    return 1 if ours else 0


def main() -> int:
    """`tests` or `fuzz`, and their arguments."""
    what, rest = sys.argv[1], sys.argv[2:]
    build()
    if what == "fuzz":
        return run(["-m", "fuzz", *rest])
    left_out = [f"--ignore=tests/{name}" for name in LEFT_OUT] + [f"--deselect={name}" for name in LEFT_OUT_TESTS]
    return run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", *left_out, "tests/core", "tests/storage", "tests/cuda", *rest]
    )


if __name__ == "__main__":
    sys.exit(main())
