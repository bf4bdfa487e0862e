"""Results of benches: figures with units and spread, the machine they were taken on, comparison, page and pictures."""

from __future__ import annotations

from mxbench.results.arguments import NewFile, json_option, mib_option, rounds_option
from mxbench.results.document import document, quantile
from mxbench.results.machine import machine

__all__ = ["NewFile", "document", "json_option", "machine", "mib_option", "quantile", "rounds_option"]
