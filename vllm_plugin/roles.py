"""What a load format makes of a worker: one that takes and offers weights (`mx`), or a fixed role.

`mx-source` reads storage and offers raw weights, it never pulls; `mx-target` only pulls raw weights, waits for a source
as long as it has to, and never reads storage. Raw weights are what was loaded, before the engine processed it: source
and target may differ in the engine's version, the accelerator and the kernels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from mxcore.transfer.member.membership import Membership
from mxserver.wire.errors import WireError
from vllm_plugin import compat

if TYPE_CHECKING:
    from vllm_plugin.loading import Load

__all__ = ["MX", "MX_SOURCE", "MX_TARGET", "Role", "Wait", "ranks_wanted", "role_of", "wait_for_ranks"]

TARGET_WAIT_SECONDS = 7200.0
TOLD_EVERY_SECONDS = 30.0
POLL_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Role(NamedTuple):
    """What a worker of a load format does."""

    load_format: str
    pulls: bool
    reads_storage: bool
    offers: bool

    @property
    def is_fixed(self) -> bool:
        """Whether it is one of the split loaders: raw weights, and the settings of those."""
        return not (self.pulls and self.reads_storage)


MX = Role("mx", pulls=True, reads_storage=True, offers=True)
MX_SOURCE = Role("mx-source", pulls=False, reads_storage=True, offers=True)
MX_TARGET = Role("mx-target", pulls=True, reads_storage=False, offers=False)


def role_of(load_format: object) -> Role:
    """The role by the load format; of whatever is no name of a fixed role, that of `mx`."""
    return next((role for role in (MX_SOURCE, MX_TARGET) if role.load_format == load_format), MX)


class Wait:
    """A bounded wait that says every half minute what it waits for. `now` and `sleep` are for tests."""

    def __init__(
        self,
        what: str,
        limit_seconds: float,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.what = what
        self.limit_seconds = limit_seconds
        self._now = now
        self._sleep = sleep
        self._began = self._told = now()
        _log.info("waiting for %s, at most %g s", what, limit_seconds)

    @property
    def left_seconds(self) -> float:
        """What is left of the time; not above 0 when it is over."""
        return self._began + self.limit_seconds - self._now()

    def pause(self) -> bool:
        """Lets a moment pass; False when the time is over."""
        left = self.left_seconds
        if left <= 0:
            return False
        self._sleep(min(POLL_SECONDS, left))
        now = self._now()
        if now - self._told >= TOLD_EVERY_SECONDS:
            self._told = now
            _log.info("still waiting for %s: %.0f of %g s", self.what, now - self._began, self.limit_seconds)
        return True


def ranks_wanted(load: Load) -> int:
    """MX_EXPECTED_WORKERS, or all that hold a part of the model."""
    return load.settings.expected_workers or compat.world_size(load.vllm_config, load.model_config)


def wait_for_ranks(membership: Membership, wait: Wait, wanted: int, *, ready: bool) -> bool:
    """Until that many ranks of these weights are published, or READY; False when the time is over."""
    while True:
        try:
            if len(membership.published_ranks(ready=ready)) >= wanted:
                return True
        except WireError as error:
            _log.debug("ranks cannot be listed: %s", error)
        if not wait.pause():
            return False
