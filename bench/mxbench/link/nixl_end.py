"""One end of NIXL's best case, in a process of its own: all bytes as one descriptor on one region of host memory.

Started with a JSON object: `bytes`, `transport` (tcp, rdma, same-host). It says `ready` with its metadata and address.
The line `connect METADATA ADDRESS` makes the other end known; then `move ROUNDS` moves all bytes so often, by WRITE
over TCP, by READ otherwise, and says `moved` with the seconds of each. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from array import array
from contextlib import ExitStack
from typing import Any

from mxcore.memory import HostBuffer
from mxcore.transfer.layout import LocalTensor, build_layout
from mxcore.transfer.move import AgentSession, Move
from mxcore.transfer.route import Operation, UcxPolicy, usable_ports

_STALL_SECONDS = 60.0
_PAGE_BYTES = 4096


def say(**values: Any) -> None:
    """One line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _tls(transport: str) -> str:
    """UCX_TLS of both ends. Raises ValueError where the transport cannot be."""
    if transport == "rdma":
        if not usable_ports():
            raise ValueError("no RDMA port can be used here")
        return UcxPolicy.from_environment("rdma").one_sided()
    return {"tcp": "tcp,self", "same-host": "tcp,cma,self"}[transport]


def main() -> None:
    """One end."""
    sys.stdout = os.fdopen(os.dup(1), "w")  # UCX and NIXL log to file 1, which becomes stderr; answers go here
    os.dup2(2, 1)
    task = json.loads(sys.argv[1])
    transport, size_bytes = task["transport"], task["bytes"]
    operation: Operation = "write" if transport == "tcp" else "read"
    buffer = HostBuffer(size_bytes)
    with memoryview(buffer) as view:
        view[::_PAGE_BYTES] = bytes(len(view[::_PAGE_BYTES]))  # touched
    threaded = transport != "tcp"
    with ExitStack() as stack:
        session = AgentSession(
            "bench-link", tls=_tls(transport), stall_timeout_seconds=_STALL_SECONDS, progress_thread=threaded
        )
        stack.callback(buffer.close_after_exports)
        stack.callback(session.fence)
        address = buffer.address
        tensor = LocalTensor("all", "torch.uint8", (size_bytes,), (1,), address, 1, address, size_bytes, "cpu", 0)
        session.register(*build_layout("raw", [tensor]))
        stack.enter_context(session.progressing())
        say(event="ready", metadata=session.metadata().hex(), address=address)
        peer, remote = "", 0
        for line in sys.stdin:
            word, *words = line.split()
            if word == "connect":
                peer, remote = session.connect(bytes.fromhex(words[0])), int(words[1])
                say(event="connected")
            elif word == "move":
                move = Move(0, array("Q", [address]), array("Q", [remote]), array("Q", [size_bytes]))
                seconds = []
                for _ in range(int(words[0])):
                    began = time.monotonic()
                    for _ in session.run(operation, [move], peer, in_flight_limit=1):
                        pass
                    seconds.append(time.monotonic() - began)
                say(event="moved", seconds=seconds)


if __name__ == "__main__":
    main()
