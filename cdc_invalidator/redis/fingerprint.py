"""Fingerprints: digests of what entries hold, which Redis makes itself, so that no value leaves the server.

Two entries with one fingerprint hold the same. The fingerprint does not depend on the TTL, nor on the order in which
Redis keeps the members of a set or the fields of a hash. The rule that holds here: a fingerprint changes nothing, and
what is too large to be read in a moment has none.
"""

from __future__ import annotations

from collections.abc import Sequence

from cdc_invalidator import errors

# Larger entries have no fingerprint: to sort and digest one of this size keeps other clients waiting for 3 ms at most.
MOST_BYTES = 256 << 10

ABSENT = b""
LARGE = b"large"
_REFUSED = b"!"

# KEYS: one key. ARGV: how many bytes of memory it may take. Returns its type and a digest of its content; empty when it
# is not there, `large` when it takes more, or why it can't be read behind a `!`: the commands beside it are none the
# worse for that. Sets and hashes are sorted: in which order they come depends on how they were made and read. Of all
# other types (lists, sorted sets, streams, those of modules) the serialized form is the same for the same content.
FINGERPRINT = """
local key, call = KEYS[1], redis.call
local function sized(texts)
  for at, text in ipairs(texts) do texts[at] = #text .. ':' .. text end
  return texts
end
local function fingerprint()
  local kind = call('TYPE', key).ok
  if kind == 'none' then return '' end
  if call('MEMORY', 'USAGE', key) > tonumber(ARGV[1]) then return 'large' end
  local content
  if kind == 'string' then
    content = call('GET', key)
  elseif kind == 'set' then
    local members = sized(call('SMEMBERS', key))
    table.sort(members)
    content = table.concat(members)
  elseif kind == 'hash' then
    local fields, rows = sized(call('HGETALL', key)), {}
    for at = 1, #fields, 2 do rows[#rows + 1] = fields[at] .. fields[at + 1] end
    table.sort(rows)
    content = table.concat(rows)
  else
    content = call('DUMP', key)
  end
  return kind .. ':' .. redis.sha1hex(content)
end
local done, found = pcall(fingerprint)
if done then return found end
return '!' .. (type(found) == 'table' and found.err or tostring(found))
"""

# What the script needs, as an ACL grants it.
RIGHTS: Sequence[str] = ("+type", "+memory|usage", "+get", "+hgetall", "+smembers", "+dump")

Look = bytes | errors.RedisUnavailable
"""A fingerprint, `ABSENT`, `LARGE`, or why there is none."""


def read(answer: Look) -> Look:
    """Read the reply to the script; why the server refuses it is returned in its place."""
    if isinstance(answer, bytes) and not answer.startswith(_REFUSED):
        return answer
    why = answer.removeprefix(_REFUSED).decode(errors="replace")[:160] if isinstance(answer, bytes) else str(answer)
    return errors.RedisUnavailable(
        f"Redis makes no fingerprints ({why}); grant the ACL user of CDC_REDIS_URL {' '.join(RIGHTS)}.", report=True
    )
