"""Moving chunks between two workers: by NIXL, over TCP, within a host; calls to a source."""

from __future__ import annotations

from mxcore.transfer.move import same_host
from mxcore.transfer.move.agent_session import FENCE_SECONDS, AgentSession, Move
from mxcore.transfer.move.chunk_greeting import (
    GREETING,
    TOKEN_BYTES,
    ChunkTls,
    chunk_server_context,
    cut_off,
    expect_token,
    show_token,
)
from mxcore.transfer.move.lease_keeper import LeaseKeeper
from mxcore.transfer.move.movers import Mover
from mxcore.transfer.move.nixl_read import NixlReadMover
from mxcore.transfer.move.nixl_write import NixlWriteMover
from mxcore.transfer.move.registered_sessions import RegisteredSessions
from mxcore.transfer.move.same_host import SameHostMover, threads_of
from mxcore.transfer.move.session_ahead import SessionAhead
from mxcore.transfer.move.source_client import AGAIN_METADATA, HAD_METADATA, PendingCall, Source, SourceClient
from mxcore.transfer.move.staged import StagedMover
from mxcore.transfer.move.tcp import TcpMover

__all__ = [
    "AGAIN_METADATA",
    "FENCE_SECONDS",
    "GREETING",
    "HAD_METADATA",
    "TOKEN_BYTES",
    "AgentSession",
    "ChunkTls",
    "LeaseKeeper",
    "Move",
    "Mover",
    "NixlReadMover",
    "NixlWriteMover",
    "PendingCall",
    "RegisteredSessions",
    "SameHostMover",
    "SessionAhead",
    "Source",
    "SourceClient",
    "StagedMover",
    "TcpMover",
    "chunk_server_context",
    "cut_off",
    "expect_token",
    "same_host",
    "show_token",
    "threads_of",
]
