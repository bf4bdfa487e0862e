"""A real S3 server (rclone) over a folder: HTTP, signatures checked. Buckets are folders, objects files."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

KEY_ID = "AKLADDERTESTKEYID"
SECRET = "the-secret-of-the-ladder-tests"  # noqa: S105 - looked for in everything that is written
RCLONE = Path(sys.executable).with_name("rclone")
START_SECONDS = 60.0


class S3Server:
    """Started by the constructor; `address` is host:port. `start` after `close` begins again there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [RCLONE, "serve", "s3", "--addr", self.address, "--auth-key", f"{KEY_ID},{SECRET}", "--config", ""]
        command += ["--dir-cache-time", "0s"]  # files that a test changes are other objects at once
        self.process = subprocess.Popen(
            [*command, self.root], stderr=subprocess.DEVNULL, env={"HOME": str(self.root.parent), "PATH": ""}
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                assert self.process.poll() is None, "rclone ended"
                assert time.monotonic() < deadline, "rclone does not listen"
                time.sleep(0.02)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def environment(address: str) -> dict[str, str]:
    """The usual variables, for a client of the server."""
    return {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
