"""What Redis runs for us: each script in one place, with what it takes and gives."""

from __future__ import annotations

from cdc_invalidator.redis.node import Node

# KEYS: the locks of all keys, then the keys. ARGV: how many keys belong to each group, in order; none where each is a
# group of its own. The locks go first, so that a fill that was overtaken can't store after its key was deleted. Gives,
# for each group, how many of its keys were there. UNLINK is allowed when memory is full.
_DELETE = """
local half = #KEYS / 2
redis.call('UNLINK', unpack(KEYS, 1, half))
local existed = {}
if #ARGV == 0 then
  local call = redis.call
  for at = 1, half do existed[at] = call('UNLINK', KEYS[half + at]) end
  return existed
end
local at = half
for group, count in ipairs(ARGV) do
  existed[group] = redis.call('UNLINK', unpack(KEYS, at + 1, at + count))
  at = at + count
end
return existed
"""


# KEYS: keys whose old values may be shown for a while; their locks are gone. ARGV: for how many milliseconds, and under
# which suffix. The time runs from the bust on, and ends it whatever comes later. Where Redis refuses to move a value
# (there is no right to, or the suffix is in another slot) it is deleted as any other. Gives how many were there.
_KEEP = """
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
# A version becomes the larger of current + 1 and Redis TIME in microseconds: it never repeats, not even after it was
# evicted and created anew. A missing one needs no bump: the next reader creates it before it loads. Where the write is
# refused (memory is full, or the key holds something else) the counter is deleted instead, which serves as well.
# Gives the new version, 0 for one that was missing, -1 for one that was deleted.
_BUMP = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local versions = {}
for at, key in ipairs(KEYS) do
  local current = redis.pcall('GET', key)
  if current == false then
    versions[at] = 0
  else
    local number = type(current) == 'string' and tonumber(current)
    local version = math.max((number or 0) + 1, now)
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


# KEYS: the watermark. ARGV: what `seal` gave of the one that was read or written last (empty: whatever is there), a
# field that is not there any more, then fields and values.
# What is there must be what we left there, else this is another data set than the one that has had the busts: a
# snapshot was loaded, or another daemon leads. The time is looked at as well, since the LSN may stand for long. A
# missing one may have been evicted; the connection tells that the server is the same.
# Gives 1; 0 when another watermark is there; -1 when memory is full.
_MARK = """
local found = redis.call('HMGET', KEYS[1], 'lsn', 'at')
if found[1] and ARGV[1] ~= '' and found[1] .. ':' .. (found[2] or '') ~= ARGV[1] then return 0 end
local stored = redis.pcall('HSET', KEYS[1], unpack(ARGV, 3))
if type(stored) ~= 'table' or not stored.err then
  redis.call('HDEL', KEYS[1], ARGV[2])
  return 1
end
if string.find(stored.err, 'OOM', 1, true) then return -1 end
return redis.error_reply(stored.err)
"""


# KEYS: the event stream. ARGV: about how many entries it keeps, then the events, in order. By a script, since a reply
# to each of them would cost us more than all the rest; trimmed once, with the last, for a fourth of Redis's time.
_APPEND = """
local call, key, last = redis.call, KEYS[1], #ARGV
for at = 2, last - 1 do call('XADD', key, '*', 'event', ARGV[at]) end
call('XADD', key, 'MAXLEN', '~', ARGV[1], '*', 'event', ARGV[last])
return last - 1
"""


class ScriptDigests:
    """The digests that a server knows our scripts by; they are the same everywhere."""

    delete = keep = bump = mark = append = ""

    async def load(self, node: Node) -> None:
        """Load them into a server, which forgets them when it ends."""
        loaded = await node.ask(*(("SCRIPT LOAD", script) for script in (_DELETE, _KEEP, _BUMP, _MARK, _APPEND)))
        self.delete, self.keep, self.bump, self.mark, self.append = (str(reply, "ascii") for reply in loaded)
