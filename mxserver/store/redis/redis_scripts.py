"""The Lua scripts of the Redis store. Every operation is one script, so it happens completely or not at all.

Keys, below the prefix:

==================  ======  =======================================================================================
clock               hash    the time that leases are judged by (see `CLOCK`)
epoch               string  the last epoch that was handed out
bytes               string  the bytes of what all records have published
replicas            zset    servers that are there, by when they were last heard (clock)
sources             set     all source ids
model:MODEL         set     source ids by model name (lower case)
in:STATUS:SOURCE    zset    record names; INITIALIZING and READY by when they were renewed, STALE by since when
of:WORKER           set     record names of one worker of one source: its ranks
turn:KEY            hash    a turn: redis_turns
due                 zset    record names by when a sweep has to look at them again, at the earliest
rec:NAME            hash    e epoch, f life, s status, u updated_at (Unix ms), r renewed, t stale since, l load,
                            o owner, m model (lower case), k source id, w WORKER, i identity, d metadata,
                            c what the server reads of large metadata, p and z whose parts it has and their bytes
parts:TOKEN         hash    large metadata in parts, by their numbers; until a record names it, it ends by itself
==================  ======  =======================================================================================

A heartbeat writes one hash and one sorted set. A search for a few records of a source walks its sorted sets, newest
first, and stops at its limit; others, and the first server after a time without any, take names first, and then the
records of some hundred names a script, so that no script is long. Nothing walks all keys. NAME begins with the rank.
The scripts make the names of keys by themselves: one Redis (with replicas, behind Sentinel, or managed), not a Redis
Cluster.
"""

from __future__ import annotations

CLOCK = """
-- Arguments of every script: 1 prefix, 2 heartbeat ms, 3 collect ms, 4 longest step ms, 5 and 6 the two times, where
-- the caller turns the clocks by hand (tests), or empty.
local P, HEARTBEAT, COLLECT, STEP = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local CLOCK = P .. 'clock'

-- All replicas judge leases by this one clock in Redis: c, in ms. It advances as much as Redis' wall clock did since c
-- was last written, but at most by the longest step. Servers write it every second, so a longer gap is time in which
-- no heartbeat could arrive (Redis or all servers were down, or the wall clock was set), and counts against nobody.
-- x is how far leases were extended in addition.
local anchor = redis.call('HMGET', CLOCK, 'c', 'wall', 'x')
local extended = tonumber(anchor[3]) or 0
local now, unix
if ARGV[5] ~= '' then
  now, unix = tonumber(ARGV[5]), tonumber(ARGV[6])
else
  local time = redis.call('TIME')
  unix = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  local gone = unix - (tonumber(anchor[2]) or unix)
  now = (tonumber(anchor[1]) or unix) + math.max(0, math.min(gone, STEP))
end
local lease_now = now - extended

local function number(value) return string.format('%.0f', value) end

local function keep_clock(always)
  local kept = tonumber(anchor[2])
  if always or not kept or unix < kept or unix - kept > STEP / 8 then
    redis.call('HSET', CLOCK, 'c', number(now), 'wall', number(unix))
  end
end
"""

_RECORDS = """
local STALE = '3'

-- What a record is now: its status and since when it is STALE; nil when there is none (any more).
local function view(name)
  local rec = redis.call('HMGET', P .. 'rec:' .. name, 's', 'r', 't', 'k')
  if not rec[1] then return nil end
  local status, renewed, since = rec[1], tonumber(rec[2]), tonumber(rec[3])
  if status ~= STALE then
    if lease_now < renewed + HEARTBEAT then return status, nil, status, rec[4] end
    since = now - (lease_now - renewed - HEARTBEAT)
  end
  if now >= since + COLLECT then return nil end
  return STALE, since, status, rec[4]
end

local function index(status, source) return P .. 'in:' .. status .. ':' .. source end

local function payload_bytes(name)
  local rec = P .. 'rec:' .. name
  local in_parts = tonumber(redis.call('HGET', rec, 'z')) or 0
  return redis.call('HSTRLEN', rec, 'i') + redis.call('HSTRLEN', rec, 'd') + in_parts
end

local function drop_parts(name, unless)
  local token = redis.call('HGET', P .. 'rec:' .. name, 'p')
  if token and token ~= '' and token ~= unless then redis.call('UNLINK', P .. 'parts:' .. token) end
end

local function remove(name)
  local rec = redis.call('HMGET', P .. 'rec:' .. name, 's', 'k', 'w', 'm')
  if not rec[1] then return end
  local source = rec[2]
  if redis.call('DECRBY', P .. 'bytes', payload_bytes(name)) <= 0 then redis.call('DEL', P .. 'bytes') end
  drop_parts(name)
  redis.call('ZREM', index(rec[1], source), name)
  redis.call('SREM', P .. 'of:' .. rec[3], name)
  redis.call('ZREM', P .. 'due', name)
  redis.call('DEL', P .. 'rec:' .. name)
  for status = 1, 3 do
    if redis.call('EXISTS', index(status, source)) == 1 then return end
  end
  redis.call('SREM', P .. 'sources', source)
  redis.call('SREM', P .. 'model:' .. rec[4], source)
end

-- Sets the status, with a new lease unless it is STALE; `before` is the kept status, `since` when it became STALE.
local function set_status(name, source, before, status, since)
  if before and before ~= status then redis.call('ZREM', index(before, source), name) end
  if status == STALE then
    redis.call('HSET', P .. 'rec:' .. name, 's', status, 't', number(since))
    redis.call('ZADD', index(status, source), number(since), name)
    redis.call('ZADD', P .. 'due', number(since + COLLECT), name)
  else
    redis.call('HSET', P .. 'rec:' .. name, 's', status, 'r', number(lease_now), 't', '')
    redis.call('ZADD', index(status, source), number(now), name)
    if before ~= '1' and before ~= '2' then redis.call('ZADD', P .. 'due', number(now + HEARTBEAT), name) end
  end
end

local function row(name)
  local status = view(name)
  if not status then return nil end
  local rec = redis.call('HMGET', P .. 'rec:' .. name, 'e', 'f', 'u', 'l', 'o', 'm')
  return {name, status, rec[1], rec[2], rec[3], rec[4] or '', rec[5], rec[6]}
end

local function refusal(name, epoch, owner)
  local rec = redis.call('HMGET', P .. 'rec:' .. name, 'f', 'o', 'e')
  if owner ~= '' and rec[2] ~= '' and rec[2] ~= owner then return {'owner'} end
  if epoch > 0 and epoch < tonumber(rec[1]) then return {'epoch', rec[1]} end
  if epoch > tonumber(rec[3]) then return {'never', rec[3]} end
  return nil
end
"""

_PRELUDE = CLOCK + _RECORDS

PUBLISH = (
    _PRELUDE
    + """
local name, source, worker, model = ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local status, epoch, owner = ARGV[11], tonumber(ARGV[12]), ARGV[13]
-- 21 the token of metadata in parts, 22 how many, 23 their bytes; 24 not empty: only says whether it would be taken.
-- 19 how far a clock may have been set back since an earlier database, which was lost, gave its epochs, in ms.
local last = math.max(tonumber(redis.call('GET', P .. 'epoch')) or 0, unix + tonumber(ARGV[19]))
if epoch > last then return {'never', number(last)} end
local current, since, kept = view(name)
if current then
  local refused = refusal(name, epoch, owner)
  if refused then return refused end
else
  remove(name)
end
-- 16 most records, 17 most of one worker, 18 most bytes of all.
local token, in_parts = ARGV[21], tonumber(ARGV[23])
local more = #ARGV[14] + #ARGV[15] + in_parts - payload_bytes(name)
if not current and redis.call('ZCARD', P .. 'due') >= tonumber(ARGV[16]) then return {'full', 'records'} end
if not current and redis.call('SCARD', P .. 'of:' .. worker) >= tonumber(ARGV[17]) then
  return {'full', 'records_per_worker'}
end
if more > 0 and (tonumber(redis.call('GET', P .. 'bytes')) or 0) + more > tonumber(ARGV[18]) then
  return {'full', 'stored_bytes'}
end
if ARGV[24] ~= '' then return {'ok'} end
if token ~= '' then
  if redis.call('HLEN', P .. 'parts:' .. token) ~= tonumber(ARGV[22]) then return {'parts'} end
  redis.call('PERSIST', P .. 'parts:' .. token)
end
drop_parts(name, token)
redis.call('INCRBY', P .. 'bytes', more)
if status == '0' then status = (not current or current == STALE) and '1' or current end
-- Never below the time in ms, nor below what a live worker has: epochs grow even if Redis lost everything.
local next_epoch = math.max((tonumber(redis.call('GET', P .. 'epoch')) or 0) + 1, unix, epoch + 1)
redis.call('SET', P .. 'epoch', number(next_epoch))
local life = epoch > 0 and epoch or next_epoch
local old = redis.call('HMGET', P .. 'rec:' .. name, 'f', 'o', 'l', 'm')
if current and epoch > 0 then life = tonumber(old[1]) end
if owner == '' then owner = old[2] or '' end
if old[4] and old[4] ~= model then redis.call('SREM', P .. 'model:' .. old[4], source) end
redis.call('HSET', P .. 'rec:' .. name, 'e', number(next_epoch), 'f', number(life), 'u', number(unix), 'r',
  number(lease_now), 'l', old[3] or '', 'o', owner, 'm', model, 'k', source, 'w', worker, 'i', ARGV[14], 'd', ARGV[15],
  'c', ARGV[20], 'p', token, 'z', number(in_parts))
set_status(name, source, kept, status, math.min(since or now, now))
redis.call('SADD', P .. 'sources', source)
redis.call('SADD', P .. 'model:' .. model, source)
redis.call('SADD', P .. 'of:' .. worker, name)
keep_clock(false)
return {'ok', row(name)}
"""
)

UPDATE = (
    _PRELUDE
    + """
-- Any number of updates, with five arguments each: name, status, epoch, load, owner.
local function update(name, status, epoch, load, owner)
  local current, since, kept, source = view(name)
  if not current then return {'unknown'} end
  local refused = refusal(name, epoch, owner)
  if refused then return refused end
  if not (status == STALE and current == STALE) then
    if load ~= '' then
      redis.call('HSET', P .. 'rec:' .. name, 'u', number(unix), 'l', load)
    else
      redis.call('HSET', P .. 'rec:' .. name, 'u', number(unix))
    end
  end
  if status ~= STALE or kept ~= STALE then set_status(name, source, kept, status, math.min(since or now, now)) end
  return {'ok'}
end

local answers = {}
for i = 7, #ARGV, 5 do
  answers[#answers + 1] = update(ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3], ARGV[i + 4])
end
keep_clock(false)
return answers
"""
)

ROWS = (
    _PRELUDE
    + """
-- The rows of these names, with what was published: identity and metadata, of which large ones are cut.
local rows = {}
for i = 7, #ARGV do
  local one = row(ARGV[i])
  if one then
    local payload = redis.call('HMGET', P .. 'rec:' .. ARGV[i], 'i', 'c', 'p')
    local cut = payload[2] and payload[2] ~= '' or payload[3] and payload[3] ~= ''
    one[9], one[10] = payload[1], cut and payload[2] or redis.call('HGET', P .. 'rec:' .. ARGV[i], 'd')
    one[11], one[12] = cut and '1' or '', number(payload_bytes(ARGV[i]))
    rows[#rows + 1] = one
  end
end
return rows
"""
)

METADATA = (
    _PRELUDE
    + """
-- The whole metadata that a record published with this epoch, or the token of its parts.
local rec = redis.call('HMGET', P .. 'rec:' .. ARGV[7], 'e', 'd', 'p')
if rec[1] ~= ARGV[8] then return false end
return {rec[2], rec[3] or ''}
"""
)

NAMES = (
    _PRELUDE
    + """
-- 7 source, 8 status, 9 rank; empty: any. The names of a source's records, and not many others: STALE ones may be under
-- the status that they had.
local names = {}
for status = 1, 3 do
  if ARGV[8] == '' or ARGV[8] == STALE or ARGV[8] == tostring(status) then
    for _, name in ipairs(redis.call('ZRANGE', index(status, ARGV[7]), 0, -1)) do
      if ARGV[9] == '' or string.match(name, '^%d+') == ARGV[9] then names[#names + 1] = name end
    end
  end
end
return names
"""
)

SOURCES_OF_MODEL = (
    _PRELUDE
    + """
return redis.call('SMEMBERS', P .. 'model:' .. ARGV[7])
"""
)

FITTING = (
    _PRELUDE
    + """
-- 7 model, 8 status, 9 rank, 10 least updated_at; empty: any. The rows, of the names that follow, that fit.
local rows = {}
for i = 11, #ARGV do
  if ARGV[9] == '' or string.match(ARGV[i], '^%d+') == ARGV[9] then
    local one = row(ARGV[i])
    if one and (ARGV[8] == '' or one[2] == ARGV[8]) and (ARGV[7] == '' or one[8] == ARGV[7])
      and tonumber(one[5]) >= (tonumber(ARGV[10]) or -1) then
      rows[#rows + 1] = one
    end
  end
end
return rows
"""
)

OF_WORKER = (
    _PRELUDE
    + """
local rows = {}
for _, name in ipairs(redis.call('SMEMBERS', P .. 'of:' .. ARGV[7])) do
  rows[#rows + 1] = row(name)
end
return rows
"""
)

FIND = (
    _PRELUDE
    + """
-- 7 source id, 8 model, 9 status, 10 rank, 11 least updated_at; empty: any. 12 limit: a few records.
local source, model, wanted, rank = ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local least, limit = tonumber(ARGV[11]) or -1, tonumber(ARGV[12])

local rows = {}
local function fits(one)
  return one and (wanted == '' or one[2] == wanted) and (model == '' or one[8] == model) and tonumber(one[5]) >= least
end

-- The newest first, in pages, until `most` are found: signs of life and the index have the same order.
local function walk(key, high, most)
  local offset, page, found = 0, 64, 0
  while found < most do
    local names = redis.call('ZREVRANGEBYSCORE', key, high, '-inf', 'LIMIT', offset, page)
    for _, name in ipairs(names) do
      if found < most and (rank == '' or string.match(name, '^%d+') == rank) then
        local one = row(name)
        if fits(one) then
          rows[#rows + 1] = one
          found = found + 1
        end
      end
    end
    if #names < page then return end
    offset, page = offset + page, 512
  end
end

for status = 1, 2 do
  if wanted == '' or wanted == tostring(status) then walk(index(status, source), '+inf', limit) end
end
return rows
"""
)

SWEEP = (
    _PRELUDE
    + """
-- 7 this replica, 8 how many records to look at; returns how many became STALE, how many are gone, how many were due.
redis.call('ZADD', P .. 'replicas', number(now), ARGV[7])
local due = redis.call('ZRANGEBYSCORE', P .. 'due', '-inf', number(now), 'LIMIT', 0, tonumber(ARGV[8]))
local stale, gone = 0, 0
for _, name in ipairs(due) do
  local status, since, kept, source = view(name)
  if not status then
    remove(name)
    redis.call('ZREM', P .. 'due', name)
    gone = gone + 1
  elseif status ~= kept then
    set_status(name, source, kept, status, since)
    stale = stale + 1
  elseif status == STALE then
    redis.call('ZADD', P .. 'due', number(since + COLLECT), name)
  else
    local renewed = tonumber(redis.call('HGET', P .. 'rec:' .. name, 'r'))
    redis.call('ZADD', P .. 'due', number(now + renewed + HEARTBEAT - lease_now), name)
  end
end
keep_clock(true)
return {stale, gone, #due}
"""
)

JOIN = (
    _PRELUDE
    + """
-- 7 this replica, 8 silence in ms after which another replica counts as gone; returns whether all are to be renewed.
redis.call('ZREMRANGEBYSCORE', P .. 'replicas', '-inf', number(now - tonumber(ARGV[8])))
local others = redis.call('ZCARD', P .. 'replicas')
redis.call('ZADD', P .. 'replicas', number(now), ARGV[7])
if others == 0 then
  -- No heartbeat could arrive since the clock was last written: that time does not count.
  local silent = now - (tonumber(anchor[1]) or now)
  extended = extended + math.max(0, silent)
  redis.call('HSET', CLOCK, 'x', number(extended))
end
keep_clock(true)
return others == 0
"""
)

RENEW = (
    _PRELUDE
    + """
-- For the first server after a time without any: living records get a whole lease, STALE ones a whole collect time.
for i = 7, #ARGV do
  local name = ARGV[i]
  local rec = redis.call('HMGET', P .. 'rec:' .. name, 's', 'k')
  local status = rec[1] == STALE and STALE or view(name)
  if status then
    set_status(name, rec[2], rec[1], status, now)
    if status ~= STALE then redis.call('HSET', P .. 'rec:' .. name, 'u', number(unix)) end
  else
    remove(name)
  end
end
return {}
"""
)

LEAVE = (
    _PRELUDE
    + """
redis.call('ZREM', P .. 'replicas', ARGV[7])
return {}
"""
)

CHECK = (
    _PRELUDE
    + """
keep_clock(true)  -- a write, because a Redis that cannot write does not work
return {}
"""
)
