"""The source checkout, where some benches find what stands in for others: its tests are in no wheel."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
