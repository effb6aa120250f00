"""What happens when Redis fails: `TABLE` has a row for each kind of failure. Pure.

`node.code` finds the row of an error. The rule that holds here: nothing that failed counts as done. Whatever a row
says, the busts concerned are applied again; rows differ in where and how soon, and in who must act.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Does(StrEnum):
    """What a failure leads to."""

    RETRY = "retry"
    """Close the connection, and apply the same again on a new one after a pause."""
    REDIRECT = "redirect"
    """In a cluster, send the command where the reply points; with a single server, as REPORT."""
    WIDEN = "widen"
    """Do something coarser instead: delete a version rather than bump it, leave the watermark to age."""
    DENY = "deny"
    """A right is missing. If it is for the busts or the sweep of some caches, only these wait: see `pipeline.gaps`. Of
    anything else, as REPORT."""
    REPORT = "report"
    """As RETRY, and log an error that says what the operator must do, since only that helps."""
    LOGIN = "login"
    """As REPORT, but not the first time: the password may be being rotated, and is read again."""


class Reply(NamedTuple):
    """One row: what to do, and the remedy for the error's message."""

    does: Does
    remedy: str


_A_CLUSTER = "CDC_REDIS_URL names a node of a cluster; write redis+cluster://host:port"
_WAIT = "it is tried again until the server is ready"

TABLE: dict[str, Reply] = {
    # Another server is the one to write to.
    "MOVED": Reply(Does.REDIRECT, _A_CLUSTER),
    "ASK": Reply(Does.REDIRECT, _A_CLUSTER),
    "TRYAGAIN": Reply(Does.RETRY, "a slot is on the move; it is tried again until that is over"),
    "CROSSSLOT": Reply(Does.REPORT, _A_CLUSTER),
    "READONLY": Reply(Does.RETRY, "it is a replica; the master is looked for again, or CDC_REDIS_URL must name it"),
    # Later it will work.
    "LOADING": Reply(Does.RETRY, _WAIT),
    "BUSY": Reply(Does.RETRY, "a script of somebody else runs for too long; it is tried again until that ends"),
    "MASTERDOWN": Reply(Does.RETRY, "it is a replica that lost its master; the master is looked for again"),
    "CLUSTERDOWN": Reply(Does.RETRY, "slots of the cluster are not served; it is tried again until they are"),
    "NOREPLICAS": Reply(Does.RETRY, "min-replicas-to-write is not met; it is tried again until it is"),
    "MISCONF": Reply(Does.REPORT, "Redis can't save its snapshot and refuses writes; look at its log and its disk"),
    "NOSCRIPT": Reply(Does.RETRY, "somebody flushed the scripts; the next connection loads them again"),
    "UNBLOCKED": Reply(Does.RETRY, _WAIT),
    # Memory is full. UNLINK is allowed then; a bump deletes its version, and the watermark stays as it is.
    "OOM": Reply(Does.WIDEN, "raise maxmemory, or set a policy that evicts"),
    # Only an operator can help.
    "NOPERM": Reply(Does.DENY, "grant the ACL user of CDC_REDIS_URL what the README lists"),
    "NOAUTH": Reply(Does.LOGIN, "put a user and a password into CDC_REDIS_URL"),
    "WRONGPASS": Reply(Does.LOGIN, "put the right user and password into CDC_REDIS_URL"),
    "WRONGTYPE": Reply(Does.REPORT, "a key of cdc-invalidator holds something else; delete it, or set CDC_WATERMARK"),
    "NOPROTO": Reply(Does.REPORT, "use Redis 6.2 or later, or Valkey"),
    # Found out at connection, see `available`.
    "NO_COMMAND": Reply(
        Does.REPORT, "have it enabled (rename-command in redis.conf, the hoster's settings), or use another Redis"
    ),
    # No reply at all.
    "TIMEOUT": Reply(Does.RETRY, "check CDC_REDIS_URL and the server, which does not answer"),
    "CLOSED": Reply(Does.RETRY, "check CDC_REDIS_URL and the server"),
    "GARBLED": Reply(Does.REPORT, "what answers does not speak Redis's protocol; check CDC_REDIS_URL"),
    # No server was asked: see `redis.source`.
    "SETTING": Reply(Does.REPORT, "correct CDC_REDIS_URL"),
    # Our own: the server answers, but is no longer the right one.
    "MOVED_AWAY": Reply(Does.RETRY, "the one that took over is looked for"),
    "OTHER_DATA": Reply(Does.RETRY, "what it has had is compared anew"),
}
"""By the first word of an error reply; the last ones are for failures without a reply."""

UNKNOWN = Reply(Does.REPORT, "look at the server's log; it is tried again")


def denies(code: str) -> bool:
    """Return whether a failure is a missing right, which other commands may not need."""
    return of(code).does is Does.DENY


def of(code: str) -> Reply:
    """Return the row of a failure; `UNKNOWN` if the table has none."""
    return TABLE.get(code, UNKNOWN)
