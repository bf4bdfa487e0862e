"""Turns in Redis: one worker has it, whichever replica it asks.

A turn is a hash under `turn:KEY` (w who has it, e the epoch, u until when by the clock of redis_scripts, a until when
it is everybody's), and ends by itself. That clock stands still while nobody can ask, and so do leases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mxserver.store.redis.redis_scripts import CLOCK
from mxserver.store.turns import EVERYBODY_SECONDS, LEASE_SECONDS, Turn, Turns

_TURN = (
    CLOCK
    + """
local name = P .. 'turn:' .. ARGV[7]
local kept = redis.call('HMGET', name, 'w', 'e', 'u', 'a')
local worker, epoch = kept[1] or '', tonumber(kept[2]) or 0
if now > (tonumber(kept[3]) or 0) then worker = '' end
local taken, everybody = false, now < (tonumber(kept[4]) or 0)
local function turn()
  local live = worker ~= '' and not everybody
  return {live and worker or '', live and number(epoch) or '0', everybody and 1 or 0, taken and 1 or 0}
end
"""
)

TAKE = (
    _TURN
    + """
local asker, named, lease = ARGV[8], tonumber(ARGV[9]), tonumber(ARGV[10])
if everybody or (worker ~= '' and (worker ~= asker or (named ~= 0 and named ~= epoch))) then return turn() end
if worker == '' then
  worker, epoch = asker, math.max(epoch + 1, named, unix)
end
redis.call('HSET', name, 'w', worker, 'e', number(epoch), 'u', number(now + lease))
redis.call('PEXPIRE', name, ARGV[11])
keep_clock(false)
taken = true
return turn()
"""
)

END = (
    _TURN
    + """
if everybody or worker == '' or worker ~= ARGV[8] or epoch ~= tonumber(ARGV[9]) then return 0 end
redis.call('HSET', name, 'w', '', 'a', number(now + tonumber(ARGV[10])))
redis.call('PEXPIRE', name, ARGV[11])
return 1
"""
)

NOW = _TURN + "return turn()"

KEPT_MS = str(3600 * 1000)  # of a turn that nobody asks for any more


class RedisTurns(Turns):
    """Turns of all servers over one Redis."""

    def __init__(self, run: Callable[..., Any]) -> None:
        """`run` runs a script with the arguments that all of them have, and these; it raises StoreUnavailable."""
        self._run = run

    def take(self, key: str, worker_id: str, epoch: int, may_begin: Callable[[], bool]) -> Turn:
        """As Turns; nothing is forgotten here, so that `may_begin` is not asked."""
        lease = str(round(LEASE_SECONDS * 1000))
        return _turn(self._run(TAKE, key, worker_id, str(epoch), lease, KEPT_MS))

    def end(self, key: str, worker_id: str, epoch: int, *, everybody: bool) -> bool:
        for_all = str(round(EVERYBODY_SECONDS * 1000) if everybody else 0)
        return bool(self._run(END, key, worker_id, str(epoch), for_all, KEPT_MS))

    def now(self, key: str) -> Turn:
        return _turn(self._run(NOW, key))


def _turn(answer: Any) -> Turn:
    worker, epoch, everybody, is_taken = answer
    return Turn(worker.decode(), int(epoch), bool(everybody), bool(is_taken))
