"""`mxserver` as a process of its own, over a cache folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType


@contextmanager
def running_server(
    cache: Path, sources: Path, *flags: str, environ: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[int, int]]:
    """Its port and process id; it may cache folders below `sources`."""
    whole = {
        **os.environ,
        "MODEL_EXPRESS_CACHE_DIRECTORY": str(cache),
        "MX_FILE_SOURCES": str(sources),
        "MX_METADATA_BACKEND": "memory",
        **environ,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "mxserver", "--host", "127.0.0.1", "--port", "0", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=whole,
    )
    assert process.stderr is not None
    port = next(line.split(" store=")[0].rpartition(":")[2] for line in process.stderr if "listening on " in line)
    drained = threading.Thread(target=process.stderr.read, daemon=True)
    drained.start()
    try:
        yield int(port), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        drained.join()
        process.stderr.close()
