"""Has this process count, and somebody serve what the ranks of its engine count."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
from multiprocessing import util
from pathlib import Path

from mxcore.metrics.families import FAMILIES
from mxcore.metrics.recording import Recorder, record, recorded
from mxserver.wire import SettingError

__all__ = ["folder_of", "start"]

_log = logging.getLogger(__name__)
LINGER_SECONDS = 30.0  # after the last rank: what was counted is scraped once more, and a restart goes on with it
_PROGRAM = Path(__file__).with_name("exporter.py")
_PROGRAM_SECONDS = 60.0
_starting = threading.Lock()


def start(port: int, *, linger_seconds: float = LINGER_SECONDS) -> None:
    """From now on this process counts, and the ranks that name this port are served there as one engine. Idempotent.

    Returns at once: where the port cannot be had, a line of the log says so later. `linger_seconds`: how long what was
    counted is served after the last rank. Raises SettingError where there is no room for the counts.
    """
    with _starting:
        if recorded() is not None:
            return
        try:
            folder = folder_of(port)
            recorder = Recorder(folder, FAMILIES)
        except OSError as error:
            raise SettingError(
                f"no metrics of this worker (MX_METRICS_PORT): {error}; TMPDIR names the folder"
            ) from error
        record(recorder)
    util.Finalize(None, recorder.leave, exitpriority=0)  # after the offers have ended
    arguments = (folder, port, linger_seconds)
    threading.Thread(target=_start_exporter, args=arguments, name="mx-metrics", daemon=True).start()


def folder_of(port: int) -> Path:
    """Where ranks of this user that would share the port count. Raises OSError where somebody else has made it."""
    network = Path("/proc/self/ns/net").stat().st_ino  # containers may share a folder for temporary files
    folder = Path(tempfile.gettempdir()) / f"mx-metrics-{os.getuid()}-{network}-{port}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or folder.is_symlink() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def _start_exporter(folder: Path, port: int, linger_seconds: float) -> None:
    paths = [path for path in sys.path if path]
    chosen = {"PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"}  # the engine's
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    command = [sys.executable, "-P", str(_PROGRAM), str(folder), str(port), str(linger_seconds)]
    try:
        ran = subprocess.run(
            command,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=_PROGRAM_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning("no metrics of this engine's workers: %s", error)
        return
    if ran.returncode:
        why = ran.stdout or f"exit code {ran.returncode}"
        _log.warning("no metrics of this engine's workers at port %d (MX_METRICS_PORT): %s", port, why)
    else:
        _log.info("metrics of this engine's workers: http://localhost:%d/metrics", port)
