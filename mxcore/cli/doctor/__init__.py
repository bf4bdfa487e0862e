"""`mx doctor`: what works on this machine, what does not, and what to do."""

from __future__ import annotations
