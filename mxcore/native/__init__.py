"""C that several compiled packages share: threads with jobs, clock, copies, CPU features."""

from __future__ import annotations
