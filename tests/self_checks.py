"""A holder that does not look at its own memory: for tests of what receivers notice, who may be the second then."""

from __future__ import annotations

import gc

from mxcore.transfer.serve import SelfCheck

__all__ = ["end_self_checks"]


def end_self_checks() -> None:
    """Ends those of this process, and lets none begin."""
    SelfCheck.start = lambda check: None  # type: ignore[method-assign]
    for check in [found for found in gc.get_objects() if isinstance(found, SelfCheck)]:
        check.stop()
