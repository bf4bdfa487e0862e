"""cuFile tried in a process of its own, with the library and the file that are its arguments.

libcufile has ended processes that opened it (an assertion about udev), has closed their standard input (where nvidia-fs
is loaded and its device nodes are not in the container), and spins for ever where it finds no CUDA driver. None of that
may happen to an engine, so this process opens it first, as the engine would, and registers the file.
"""

from __future__ import annotations

import os
import subprocess
import sys

from mxcore.reading import FileSet, cufile
from mxserver.wire import MxError

__all__ = ["trial"]

_SECONDS = 60.0
_WELL = "it opens"


def trial(file: str | None) -> str:
    """Why cuFile is not to be opened in this process, or not for that file; "" if it may be. Never raises."""
    try:
        command = _command(cufile.library_file(), file)
    except MxError as error:
        return str(error.args[0])
    environment = {"CUFILE_LOGFILE_PATH": os.devnull, **os.environ}  # else a cufile.log in the working directory
    try:
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"cuFile does not open within {_SECONDS:g} s"
    except OSError as error:
        return f"cuFile cannot be tried: {error}"
    said = (ran.stdout.strip().splitlines() or [""])[-1]
    if ran.returncode or not said:
        return f"cuFile ends the process that opens it ({ran.returncode})"
    return "" if said == _WELL else said


def _command(library: str, file: str | None) -> list[str]:
    start = f"from {__name__} import in_own_process; in_own_process()"
    return [sys.executable, "-c", start, library, *([file] if file is not None else [])]


def attempt(files: list[str]) -> str:
    """What `trial` asks for, in this process: the last line that it prints."""
    try:
        with FileSet(files) as opened:
            handles = cufile.FileHandles(opened)
            for index in range(len(files)):
                handles.register(index)
            handles.close()
    except MxError as error:
        return str(error.args[0])
    return _WELL


def in_own_process() -> None:
    """The process that `trial` starts: the library and the files are its arguments. Does not return."""
    cufile.CANDIDATES = (sys.argv[1],)
    print(attempt(sys.argv[2:]), flush=True)  # noqa: T201
    os._exit(0)  # what libcufile does at the end of a process is no matter of the trial
