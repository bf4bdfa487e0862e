"""NIXL through its C library, opened at run time: agents, registrations, transfers, notifications."""

from __future__ import annotations

from mxcore.nixl.agent import NixlAgent, Transfer, load_library
from mxcore.nixl.library import NIXL_PACKAGES
from mxcore.nixl.mailbox import Mailbox
from mxcore.nixl.table import notifies

__all__ = ["NIXL_PACKAGES", "Mailbox", "NixlAgent", "Transfer", "load_library", "notifies"]
