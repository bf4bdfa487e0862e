"""A reader's lease, and what it is told when it asks for chunks."""

from __future__ import annotations

import socket
import threading
from array import array
from contextlib import ExitStack
from dataclasses import dataclass, field

from mxcore.sockets import ChunkSender

__all__ = ["AskAnswer", "Lease"]


@dataclass
class Lease:
    """One receiver's right to read. The holder's lock guards it."""

    lease_id: str
    deadline: float  # monotonic seconds; extended by every call of the receiver
    peer: str | None = None  # the receiver's agent, once a transfer is open
    remote_addresses: array[int] = field(default_factory=lambda: array("Q"))  # of every segment, there
    reader: str = ""  # who has it: its address, and the name in its certificate
    read_at: float = 0.0  # monotonic seconds: when it last was granted something
    granted: int = 0  # chunks, those that it declined taken off
    sender: ChunkSender | None = None  # sends what it was granted
    remote_device: int | None = None  # that they are on, as its process counts; None: host memory
    pushes: int = 0  # streams that are running
    turn: threading.Lock = field(default_factory=threading.Lock)  # held by the stream that begins chunks
    token: bytes = b""  # that its connections to the chunk port show, once a transfer is open that sends
    connections: set[socket.socket] = field(default_factory=set)  # to the chunk port, shut down when it ends
    connecting: ExitStack = field(default_factory=ExitStack)  # from the opening to the end of the first stream
    transport: str = "same-host"  # how its chunks go, for the metrics
    ended: bool = False


@dataclass(frozen=True)
class AskAnswer:
    """What a reader is told: the chunks that it may fetch now, and what is there as of `version`.

    With nothing granted, `pause_seconds` says when to ask again (0: at any time). A `leaving` holder still serves its
    readers for a while; those that can do without it end.
    """

    granted: list[int]
    version: int
    have: int
    complete: bool
    leaving: bool = False
    pause_seconds: float = 0.0
