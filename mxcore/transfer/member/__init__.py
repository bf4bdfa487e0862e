"""A worker's life in a fleet: join, find sources, receive, serve, drain."""

from __future__ import annotations

from mxcore.transfer.member.directory import Directory, differs_least, equal_but_for_files
from mxcore.transfer.member.manifest import manifest_of
from mxcore.transfer.member.membership import CHECKPOINT_PARAMETER, PROTOCOL_VERSION, Membership
from mxcore.transfer.member.place import current_place
from mxcore.transfer.member.refusals import Refusal, Side, refusals_of

__all__ = [
    "CHECKPOINT_PARAMETER",
    "PROTOCOL_VERSION",
    "Directory",
    "Membership",
    "Refusal",
    "Side",
    "current_place",
    "differs_least",
    "equal_but_for_files",
    "manifest_of",
    "refusals_of",
]
