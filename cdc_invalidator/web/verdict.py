"""The first sentence of the page: how old caches are, or what is wrong, since when, and what to do. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

# A watermark moves once a second; a leader that is so far behind is no longer a matter of moments.
LATE_SECONDS = 10.0
NAMED = 5

Level = Literal["ok", "busy", "wrong"]


class Verdict(NamedTuple):
    """``level``: whether somebody must act; ``since``: when it began, in ISO 8601, where that is known.

    ``to_do``: what follows from it, where the text does not say it.
    """

    level: Level
    text: str
    since: str | None = None
    to_do: str | None = None


def judge(
    status: Mapping[str, Any], view: Mapping[str, Any], *, hangs: str | None, old: bool, as_of: float | None, now: float
) -> Verdict:
    """Return what matters most.

    Args:
        status: what /status shows.
        view: see `Daemon.view`.
        hangs: a sentence, if the daemon does not answer at all.
        old: it does not answer now.
        as_of: up to which Unix time all commits are busted, as far as that is known.
        now: the Unix time.
    """
    leads = status["role"] == "leader" and status["mode"] != "observe"
    if hangs is not None:
        return Verdict("wrong", hangs)
    if status["last_error"]:
        older = (
            f"Until that is over, caches get older: they may be {seconds(now - as_of)} old."
            if leads and as_of
            else None
        )
        return Verdict("wrong", status["last_error"], status.get("last_error_since"), older)
    if old:
        return Verdict("busy", "The daemon has not answered for a second; what you see is from before.")
    if status["role"] == "connecting":
        return Verdict("busy", "The daemon connects to PostgreSQL and Redis. No busts until then.")
    if view["unpublished"]:
        tables = names([table["table"] for table in view["unpublished"]])
        caches = sorted({cache for table in view["unpublished"] for cache in table["caches"]})
        return Verdict(
            "wrong",
            f"Changes of {tables} are not seen, so that old values stay in {names(caches)}.",
            view["unpublished_since"],
            "What to do: run what is below, under “Tables that are not published”.",
        )
    reload = status["rules"]["last_reload"]
    if reload and reload["result"] == "failed":
        return Verdict(
            "wrong",
            "The rule files can't be used, so the rules from before stay in force.",
            reload["at"],
            f"What to do: mend {reload['error']}",
        )
    if status["role"] == "standby":
        return Verdict(
            "ok", "This daemon stands by, and takes over when the one that busts goes. Ask that one how old caches are."
        )
    if status["mode"] == "observe":
        return Verdict("ok", "This daemon only observes (CDC_MODE=observe): it busts nothing.")
    if as_of is None:
        return Verdict("busy", "Busts have begun. How old caches are is known once the watermark is written.")
    age = max(0.0, now - as_of)
    if age > LATE_SECONDS:
        behind = f"{status['backlog_keys']:,} keys and {size(status['lag_bytes'] or 0)} of WAL"
        return Verdict(
            "wrong",
            f"Caches may be {seconds(age)} old: the daemon is {behind} behind.",
            None,
            "What to do: nothing while the backlog below shrinks. If it grows all the time, look at the last errors "
            "below, at slow `via` queries, and at the load of Redis.",
        )
    text = f"Caches are at most {seconds(age)} old"
    if view["swept"]:
        reasons = names(sorted(set(view["swept"].values())))
        return Verdict(
            "busy",
            f"{text}, except {names(sorted(view['swept']))}: changes may have been missed ({reasons}), so these are "
            "swept.",
            None,
            "What to do: nothing, unless it lasts. It is over after the sweep, once all transactions of that time have "
            "ended.",
        )
    return Verdict("ok", f"{text}.")


def names(found: Sequence[str]) -> str:
    """Return some names as a sentence has them."""
    some = ", ".join(found[:NAMED])
    return f"{some} and {len(found) - NAMED} more" if len(found) > NAMED else some


def seconds(number: float) -> str:
    """Return a duration for people."""
    if number < 120:
        return f"{number:.1f} s" if number < 10 else f"{number:.0f} s"
    return f"{number / 60:.0f} min" if number < 7200 else f"{number / 3600:.1f} h"


def size(number: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError
