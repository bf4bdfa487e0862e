"""A real S3 server (rclone) over a folder: HTTP, signatures checked. Buckets are folders, objects files.

rclone answers a range with 200 and Content-Range where S3 says 206: a proxy before it puts that right.
`python -m mxbench.stand_ins.s3_server FOLDER HOST` prints its address and serves until it is killed.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from mxbench.needs import need_rclone
from mxbench.stand_ins.tcp_proxy import TcpProxy

KEY_ID = "AKLADDERTESTKEYID"
SECRET = "the-secret-of-the-ladder-tests"  # noqa: S105 - looked for in everything that is written
START_SECONDS = 60.0


class S3Server:
    """Started by the constructor. `address` is host:port, with partial answers; `own_address` rclone's, without.

    `start` after `close` begins again there. `changing`: files that are changed are other objects at once, for which
    rclone digests a whole object at every request. `host` is what clients call.
    """

    def __init__(self, root: Path, *, changing: bool = True, host: str = "127.0.0.1") -> None:
        self.root = root
        self._changing = changing
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        self.own_address = f"127.0.0.1:{self.port}"
        self._front = TcpProxy(self.own_address, ranges_are_partial=True, here=host)
        self.address = self._front.address
        self.start()

    def start(self) -> None:
        command = [str(need_rclone()), "serve", "s3", "--addr", self.own_address, "--auth-key", f"{KEY_ID},{SECRET}"]
        command += ["--config", "", "--dir-cache-time", "0s" if self._changing else "1h"]
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
        self.process.kill()  # it keeps nothing, and would wait for connections that clients hold open
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._front.__exit__(kind, error, trace)


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


if __name__ == "__main__":
    with S3Server(Path(sys.argv[1]), changing=False, host=sys.argv[2]) as running:
        print(running.address, flush=True)
        signal.pause()
