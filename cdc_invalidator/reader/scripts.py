"""The scripts by which a reader keeps the fill contract. Pure: texts, and the digests that servers know them by.

Each is safe to send twice, as drivers do after a lost connection, even if the first copy is executed last: a lease has
a number from the server's clock behind its token, so a copy that comes after a bust makes another lease.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha1

# KEYS: the lock, the key, and for a cache with stale_for the old value's key. ARGV: token, milliseconds of the lease,
# what a value must begin with.
# Looks once more, so that nobody loads what was stored in the meantime. Returns the value; or a number above 0: the
# lease is yours, held under token:number, so load; or 0: another reader loads; or -1: another reader has loaded what is
# not stored, so load as well, without storing; or, for a cache with stale_for, a list with the old value or nothing
# instead of 0 and -1.
TAKE = """
local value = redis.call('GET', KEYS[2])
if value and string.sub(value, 1, #ARGV[3]) == ARGV[3] then return value end
local mine, held = ARGV[1] .. ':', redis.call('GET', KEYS[1])
if held and string.sub(held, 1, #mine) == mine then return tonumber(string.sub(held, #mine + 1)) end
if held then return KEYS[3] and {redis.call('GET', KEYS[3])} or held == '-' and -1 or 0 end
local time = redis.call('TIME')
local number = time[1] * 1000000 + time[2]
redis.call('SET', KEYS[1], mine .. string.format('%.0f', number), 'PX', ARGV[2])
return number
"""

# KEYS: versions, which may repeat. ARGV: token, milliseconds of the lease, what a value must begin with, milliseconds
# that a version is kept, suffix of locks, suffix of old values and versions (empty: none), and for each version a key
# with NUL in its place.
# The versions first, then the keys with them, and the leases on those without a value. A missing version is made from
# the clock, in microseconds, so that it never repeats; and from its place, since the clock stands while a script runs,
# and a key may lack what its version tells apart. Without a token it only looks.
# Returns for each key its version, and the same as TAKE; nothing instead of a lease where it only looked.
VERSIONED = """
local versions, made, keys = redis.call('MGET', unpack(KEYS)), {}, {}
for at, name in ipairs(KEYS) do
  local version = versions[at] or made[name]
  if not version then
    local time = redis.call('TIME')
    version = string.format('%.0f', time[1] * 1000000 + time[2] + at - 1)
    redis.call('SET', name, version, 'PX', ARGV[4])
    made[name] = version
  end
  versions[at], keys[at] = version, (string.gsub(ARGV[at + 6], '%z', version))
end
local values, header, mine = redis.call('MGET', unpack(keys)), ARGV[3], ARGV[1] .. ':'
local function leased(at)
  if ARGV[1] == '' then return false end
  local lock = keys[at] .. ARGV[5]
  local held = redis.call('GET', lock)
  if not held then
    local time = redis.call('TIME')
    local number = time[1] * 1000000 + time[2]
    redis.call('SET', lock, mine .. string.format('%.0f', number), 'PX', ARGV[2])
    return number
  end
  if string.sub(held, 1, #mine) == mine then return tonumber(string.sub(held, #mine + 1)) end
  if ARGV[6] == '' then return held == '-' and -1 or 0 end
  local old = redis.call('GET', keys[at] .. ARGV[6])
  local before = not old and redis.call('GET', KEYS[at] .. ARGV[6])
  if before then old = redis.call('GET', (string.gsub(ARGV[at + 6], '%z', before))) end
  return {old}
end
local found = {}
for at, value in ipairs(values) do
  if not value or string.sub(value, 1, #header) ~= header then value = leased(at) end
  found[2 * at - 1], found[2 * at] = versions[at], value
end
return found
"""

# KEYS: the version. ARGV: milliseconds that it is kept. Returns the version, which is made if it is missing: for a
# cluster where it lies in another hash slot than the keys under it.
VERSION = """
local version = redis.call('GET', KEYS[1])
if not version then
  local time = redis.call('TIME')
  version = string.format('%.0f', time[1] * 1000000 + time[2])
  redis.call('SET', KEYS[1], version, 'PX', ARGV[1])
end
return version
"""

# KEYS: the lock. ARGV: token, milliseconds of the lease. Takes it from any holder, and returns its number.
SEIZE = """
local time = redis.call('TIME')
local number = time[1] * 1000000 + time[2]
redis.call('SET', KEYS[1], ARGV[1] .. ':' .. string.format('%.0f', number), 'PX', ARGV[2])
return number
"""

# KEYS: the lock, the key. ARGV: token:number, value, milliseconds.
# Stores only while the lease is held: a bust deletes the lock before the key, so what it overtook is dropped.
# Returns 1 if stored, 0 if dropped.
FILL = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('UNLINK', KEYS[1])
return 1
"""

# KEYS: the lock. ARGV: token:number, milliseconds. Extends the lease, if it is still held. Returns 1 if it is, else 0.
RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

# KEYS: the lock. ARGV: token:number, or token: of a TAKE whose answer is not known; and perhaps for how many
# milliseconds those that wait are told that nothing is stored. Gives the lease back, if it is still held. What is left
# in the lock for those that wait is no lease: nobody stores under it, and a bust deletes it.
# Returns 1 if it was held, else 0.
RELEASE = """
local held = redis.call('GET', KEYS[1])
if not held or string.sub(held, 1, #ARGV[1]) ~= ARGV[1] then return 0 end
if ARGV[2] then redis.call('SET', KEYS[1], '-', 'PX', ARGV[2]) else redis.call('UNLINK', KEYS[1]) end
return 1
"""


# Put before TAKE, VERSIONED, VERSION or LOOK, for a read that asks for a freshness: what these find is served only if
# the watermark beside it proves it. Look and proof are one script, so they come from one server, whichever it is: a
# master that was replaced, one that lost what it had, and one that a client was sent on to, each have a watermark.
# ARGV, behind those of the script: the watermark, which is not among KEYS since in a cluster it has another hash slot;
# the digest of the agreement by which the key was made (empty: none was there), since what was busted under other names
# proves nothing of this one; the cache; the LSN that is needed; until when all commits must be included (ms since 1970;
# empty: no matter); the standby that values are loaded from (empty: the primary); in a cluster the hash slot of the key
# (else empty).
# Numbers are compared as texts: Lua counts exactly below 2^53 only.
# Returns a list with one word if there is no proof: elsewhere: the watermark was not written for the node and hash slot
# where the key is now; the others are those of the read's bypasses.
PROOF = """
local last = #ARGV
local cache, lsn, as_of, standby, slot = ARGV[last - 4], ARGV[last - 3], ARGV[last - 2], ARGV[last - 1], ARGV[last]
local mark = redis.pcall('HMGET', ARGV[last - 6], 'lsn', 'as_of', 'rules', 'standbys', 'at', 'home', 'agreed')
if mark.err then return string.find(mark.err, 'non local key', 1, true) and {'elsewhere'} or mark end
local function below(number, least)
  return not string.find(number, '^%d+$') or #number < #least or #number == #least and number < least
end
if not mark[3] or below(mark[1] or '', '0') then return {'no_watermark'} end
local said_at, said = string.match(mark[7] or '', '^(%d+) (%w+)$')
if (said_at == mark[5] and said or '') ~= ARGV[last - 5] then return {'templates_differ'} end
if not string.find(mark[3], '"' .. cache .. '":', 1, true) then return {'not_covered'} end
local _, standbys = pcall(cjson.decode, mark[4] or '{}')
if standby ~= '' and (type(standbys) ~= 'table' or type(standbys[standby]) ~= 'string') then return {'standby'} end
if below(mark[1], lsn) then return {'behind'} end
if as_of ~= '' and below(mark[2] or '', as_of) then return {'old'} end
if slot ~= '' then
  local at, node, ranges = string.match(mark[6] or '', '^(%d+) (%w+) (.*)$')
  local here = false
  if at == mark[5] and node == redis.call('CLUSTER', 'MYID') then
    for first, final in string.gmatch(ranges, '(%d+)-(%d+)') do
      if tonumber(first) <= tonumber(slot) and tonumber(slot) <= tonumber(final) then here = true end
    end
  end
  if not here then return {'elsewhere'} end
end
"""

# KEYS: two or more. Returns their values. Only used behind PROOF; without it, the command will do.
LOOK = """
return redis.call('MGET', unpack(KEYS))
"""


def _digest(text: str) -> bytes:
    return sha1(text.encode(), usedforsecurity=False).hexdigest().encode()


_PROVEN = (TAKE, VERSIONED, VERSION, LOOK)


@dataclass(frozen=True, slots=True)
class FillScripts:
    """The digests of all scripts, and ``texts`` by digest for a server that does not know one yet.

    ``proven``: from a script's digest to that of the same behind PROOF.
    """

    take: bytes = field(default_factory=lambda: _digest(TAKE))
    versioned: bytes = field(default_factory=lambda: _digest(VERSIONED))
    version: bytes = field(default_factory=lambda: _digest(VERSION))
    seize: bytes = field(default_factory=lambda: _digest(SEIZE))
    fill: bytes = field(default_factory=lambda: _digest(FILL))
    renew: bytes = field(default_factory=lambda: _digest(RENEW))
    release: bytes = field(default_factory=lambda: _digest(RELEASE))
    look: bytes = field(default_factory=lambda: _digest(LOOK))
    proven: dict[bytes, bytes] = field(
        default_factory=lambda: {_digest(text): _digest(PROOF + text) for text in _PROVEN}
    )
    texts: dict[bytes, str] = field(
        default_factory=lambda: {
            _digest(text): text
            for text in (
                *(TAKE, VERSIONED, VERSION, SEIZE, FILL, RENEW, RELEASE),
                *(PROOF + text for text in _PROVEN),
            )
        }
    )
