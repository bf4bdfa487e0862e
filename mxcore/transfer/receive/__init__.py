"""Receiving weights from several holders at once, and what is told of it."""

from __future__ import annotations

from mxcore.transfer.receive.change_log import RecentErrors, logged
from mxcore.transfer.receive.content_claims import Content
from mxcore.transfer.receive.load_progress import LoadPath, LoadReporter
from mxcore.transfer.receive.receive_report import ReceiveReport
from mxcore.transfer.receive.received_chunks import ProgressCallback, ReceivedChunks
from mxcore.transfer.receive.receiver import Receiver

__all__ = [
    "Content",
    "LoadPath",
    "LoadReporter",
    "ProgressCallback",
    "ReceiveReport",
    "ReceivedChunks",
    "Receiver",
    "RecentErrors",
    "logged",
]
