"""The scripts that Redis runs for the daemon: each with its arguments, its reply, and the command that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cdc_invalidator import errors
from cdc_invalidator.redis import available, fingerprint
from cdc_invalidator.redis.node import Command, Node
from cdc_invalidator.redis.watermark import Watermark
from cdc_invalidator.rules.agreement import Agreement
from cdc_invalidator.rules.suffixes import STALE_SUFFIX

BUMP_MISSING = 0
BUMP_DELETED = -1
_WATERMARK_WRITTEN = 1
_OTHER_WATERMARK = 0

# KEYS: the locks of all keys, then the keys. ARGV: how many locks there are, then how many keys belong to each group,
# in order; none where each is a group of its own. The locks go first, so that a fill that was overtaken can't store
# after its key was deleted. UNLINK is allowed when memory is full. Returns, for each group, how many of its keys were
# there.
DELETE = """
local call, at, existed = redis.call, tonumber(ARGV[1]), {}
call('UNLINK', unpack(KEYS, 1, at))
if #ARGV == 1 then
  for group = 1, #KEYS - at do existed[group] = call('UNLINK', KEYS[at + group]) end
  return existed
end
for group = 1, #ARGV - 1 do
  local count = ARGV[group + 1]
  existed[group] = call('UNLINK', unpack(KEYS, at + 1, at + count))
  at = at + count
end
return existed
"""

# KEYS: keys whose old values may be shown for a while; their locks are gone. ARGV: for how many milliseconds, and under
# which suffix. The time runs from the bust on, and ends it whatever comes later. Where Redis refuses to move a value
# (a right is missing, or the suffix is in another hash slot) the key is deleted as usual. Returns how many were there.
KEEP = """
local existed = 0
for _, key in ipairs(KEYS) do
  local bound = redis.pcall('PEXPIRE', key, ARGV[1])
  if bound == 1 then
    if redis.pcall('RENAME', key, key .. ARGV[2]).err then redis.call('UNLINK', key) end
    existed = existed + 1
  elseif bound ~= 0 then
    existed = existed + redis.call('UNLINK', key)
  end
end
return existed
"""

# KEYS: version counters. ARGV: for each, the milliseconds that it is kept; then, for each, for how many milliseconds
# the version before it is left under a suffix (0: not at all), and the suffix.
# A version becomes the larger of current + 1 and Redis TIME in microseconds, and a step more that depends on both. It
# never repeats, not even after it was evicted and created anew and the clock went back: steps are so wide (134 million
# on average) that one made later meets none made before. A missing version needs no bump: the next reader creates it
# before it loads. Lua counts exactly below 2^53 only: a version near that or above is left for one of the clock. Where
# the write is refused (memory is full, or the key holds something else) the counter is deleted instead, which serves as
# well.
# Returns the new version, 0 for one that was missing, -1 for one that was deleted.
BUMP = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local versions = {}
for at, key in ipairs(KEYS) do
  local current = redis.pcall('GET', key)
  if current == false then
    versions[at] = 0
  else
    local number = type(current) == 'string' and tonumber(current)
    local before = number and number >= 0 and number < 9007198717870080 and math.floor(number) or 0
    local version = math.max(before + 1, now) + (now % 1000000007 + before % 1000003) * 48271 % 268435399
    local stored = number and redis.pcall('SET', key, string.format('%.0f', version), 'PX', ARGV[at])
    if stored and not stored.err then
      versions[at] = version
      local grace = ARGV[#KEYS + at]
      if grace ~= '0' then redis.pcall('SET', key .. ARGV[2 * #KEYS + 1], current, 'PX', grace) end
    else
      redis.call('UNLINK', key)
      versions[at] = -1
    end
  end
end
return versions
"""

# KEYS: the watermark. ARGV: the `watermark_id` of the one that was read or written last (empty: whatever is there),
# how many fields to remove, those, then fields and values, `rules` first.
# What is there must be what we left there, else this is another data set than the one that has had the busts: a
# snapshot was loaded, the database was swapped (SWAPDB) or emptied, or another daemon leads. The connection does not
# tell: it stays open in all these cases. The time is looked at as well, since the LSN may stand for long. A missing one
# may also have been evicted, but nothing proves that.
# Returns 1; 0 when another watermark is there, or none; -1 when memory is full: then the one there stays, but it names
# no cache if this one would have named others, and tells readers nothing if this one would have told something else.
WRITE_WATERMARK = """
local found = redis.call('HMGET', KEYS[1], 'lsn', 'at', 'rules', 'agreed')
if ARGV[1] ~= '' and (found[1] or '') .. ':' .. (found[2] or '') ~= ARGV[1] then return 0 end
local first = 3 + ARGV[2]
local stored = redis.pcall('HSET', KEYS[1], unpack(ARGV, first))
if type(stored) ~= 'table' or not stored.err then
  if first > 3 then redis.call('HDEL', KEYS[1], unpack(ARGV, 3, first - 1)) end
  return 1
end
if string.find(stored.err, 'OOM', 1, true) then
  if found[3] ~= ARGV[first + 1] then redis.call('HDEL', KEYS[1], 'rules') end
  for at = first, #ARGV, 2 do
    if ARGV[at] == 'agreed' and string.match(ARGV[at + 1], ' .*') ~= string.match(found[4] or '', ' .*') then
      redis.call('HDEL', KEYS[1], 'agreed')
    end
  end
  return -1
end
return redis.error_reply(stored.err)
"""

# KEYS: the event stream. ARGV: about how many entries it keeps, then the events, in order. By a script, since a reply
# to each of them would cost us more than all the rest; trimmed once, with the last, for a fourth of Redis's time.
APPEND = """
local call, key, last = redis.call, KEYS[1], #ARGV
for at = 2, last - 1 do call('XADD', key, '*', 'event', ARGV[at]) end
call('XADD', key, 'MAXLEN', '~', ARGV[1], '*', 'event', ARGV[last])
return last - 1
"""


class Written(NamedTuple):
    """The watermark that is there, by its `watermark_id` (if empty, any may be), and the agreement that was written.

    The agreement may be long and hardly ever changes, so it is not written each time.
    """

    id: str = ""
    agreement: Agreement | None = None

    @classmethod
    def of(cls, watermark: Watermark | None) -> Written:
        """Return what stays of a watermark that was read or written."""
        return cls(watermark_id(watermark), watermark.agreement if watermark else None)


class ScriptDigests:
    """The digests that servers know our scripts by, the same on each server; and the commands that run the scripts."""

    delete = keep = bump = write_watermark = append = fingerprint = ""

    # Whether the user may only read keys.
    read_only = False
    _look = "EVALSHA"

    async def load(self, node: Node) -> None:
        """Load the scripts into a server, which forgets them when it ends."""
        scripts = (DELETE, KEEP, BUMP, WRITE_WATERMARK, APPEND, fingerprint.FINGERPRINT)
        loaded = [str(reply, "ascii") for reply in await node.ask(*(("SCRIPT LOAD", script) for script in scripts))]
        self.delete, self.keep, self.bump, self.write_watermark, self.append, self.fingerprint = loaded
        if self.read_only and not await available.lacking(node, ["EVALSHA_RO"]):
            # An ACL may grant it for keys that the user may not write; Redis has it since 7.0.
            self._look = "EVALSHA_RO"

    def to_delete(self, locks: Sequence[bytes], keys: Sequence[bytes], group_sizes: Sequence[int]) -> Command:
        """Return the command that deletes keys with their locks, and counts how many of each group were there.

        Args:
            locks: of all keys.
            keys: of all groups, one group after the other.
            group_sizes: how many keys each group has; empty where each key is a group of its own.
        """
        return ("EVALSHA", self.delete, len(locks) + len(keys), *locks, *keys, len(locks), *group_sizes)

    def to_keep(self, keys: Sequence[bytes], grace: int) -> Command:
        """Return the command that leaves the old values of deleted keys for ``grace`` ms; it counts the keys there."""
        return ("EVALSHA", self.keep, len(keys), *keys, grace, STALE_SUFFIX)

    def to_bump(self, counters: Sequence[bytes], bumps: Mapping[bytes, int], graces: Mapping[bytes, int]) -> Command:
        """Return the command that bumps some of ``bumps`` and gives their new versions."""
        graces_of = [graces.get(key, 0) for key in counters]
        times = [bumps[key] for key in counters]
        return ("EVALSHA", self.bump, len(counters), *counters, *times, *graces_of, STALE_SUFFIX)

    def to_fingerprint(self, key: bytes) -> Command:
        """Return the command that makes the fingerprint of an entry; `fingerprint.read` reads its reply."""
        return (self._look, self.fingerprint, 1, key, fingerprint.MOST_BYTES)

    def to_write_watermark(self, key: bytes, last: Written, watermark: Watermark, home: str = "") -> Command:
        """Return the command that writes a watermark over the last one.

        `watermark_written` reads its reply. ``home``: of a cluster's node, see `hashslots.View.homes`.
        """
        fields, agreement = watermark.fields(), watermark.agreement
        # Each with the time again: a daemon of an earlier release writes the other fields, and lets these stand.
        if home:
            fields["home"] = f"{watermark.at} {home}"
        if agreement is not None:
            fields["agreed"] = f"{watermark.at} {agreement.digest}"
            if agreement is not last.agreement:
                fields |= agreement.fields
        pairs = [part for item in fields.items() for part in item]
        absent = watermark.absent
        return ("EVALSHA", self.write_watermark, 1, key, last.id, len(absent), *absent, *pairs)


def watermark_id(watermark: Watermark | None) -> str:
    """Return what a watermark is recognised by when the next one is written over it; empty for none."""
    return f"{watermark.lsn}:{watermark.at}" if watermark else ""


def is_watermark(last_id: str, lsn: bytes | None, at: bytes | None) -> bool:
    """Return whether a hash with these fields is the watermark with that `watermark_id`; if empty, any is."""
    return not last_id or last_id.encode() == b"%b:%b" % (lsn or b"", at or b"")


def watermark_written(answer: int) -> bool:
    """Read the reply to `ScriptDigests.to_write_watermark`: False when memory is full.

    Raises:
        errors.RedisUnavailable: the watermark that was written last is not there.
    """
    if answer == _OTHER_WATERMARK:
        raise other_data()
    return answer == _WATERMARK_WRITTEN


def other_data() -> errors.RedisUnavailable:
    """Return the error for a watermark that is not, or was not all the while, the one that was written last."""
    return errors.RedisUnavailable(
        "Redis does not hold the watermark that was written last, or did not for a moment, so its data are or were "
        "others; they are compared anew.",
        code="OTHER_DATA",
    )
