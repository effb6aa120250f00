"""`observe`: the closing report of a daemon that has observed for a while. Pure.

The figures are those of `Observe.status`, which /status shows while the daemon runs; here they are put into words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cdc_invalidator import errors

# From this share on, the application is said not to delete the keys at all.
NEARLY_ALL = 0.9


def report(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the closing report as plain values, for JSON.

    Args:
        status: what /status shows at the end of the daemon.

    Raises:
        errors.InvalidatorError: it has observed nothing, for whatever reason.
    """
    observed: dict[str, Any] = status["observed"]
    if observed["observed_s"] is None:
        why = status["last_error"] or (
            f"another daemon has the slot {status['slot']}, give CDC_SLOT another name"
            if status["role"] == "standby"
            else "the time was over before PostgreSQL and Redis had answered, give --for more"
        )
        raise errors.InvalidatorError(f"Nothing was observed: {why.rstrip('.')}.")
    stale = [each for each in observed["caches"] if each.get("stale")]
    remedies = sorted(stale, key=lambda each: -each["stale"])
    return observed | {"would_mend": [{name: each[name] for name in ("rule", "cache", "stale")} for each in remedies]}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a closing report as text: what was found, and under each finding what to do with it."""
    yield f"observed for {_seconds(found['observed_s'])}; nothing was deleted"
    changed = [each for each in found["caches"] if each.get("changes")]
    if not changed:
        yield "  -> no change has met a rule: nobody wrote, or the rules name other tables (see explain --table)"
    for each in changed:
        yield ""
        yield f"cache {each['cache']}, rule {each['rule']}: {_many(each['changes'], 'change')}"
        yield from _of_rule(each)
    for each in found["caches"]:
        if each.get("sweeps"):
            yield ""
            yield f"cache {each['cache']}: {_many(each['sweeps'], 'sweep')} would have deleted all its entries"
            yield "  -> TRUNCATE sweeps, and changes that can't name their keys: see what check says of its rules"
    if found["worst"]:
        yield ""
        yield f"stale for longest ({found['stale_now']:,} still are)"
    for each in found["worst"]:
        named = each.get("raw_keys") or each.get("key_hashes") or [each.get("key_prefix", "")]
        yield (
            f"  {_seconds(each['stale_s'])}  {named[0]}  cache {each['cache']}, rule {each['rule']}, xid {each['xid']}"
        )
    if found["worst"]:
        hashed = "" if any("raw_keys" in each for each in found["worst"]) else "; CDC_LOG_KEYS=raw shows the keys"
        yield f"  -> events named stale have the time of each: look there in your application's logs{hashed}"
    if found["error"]:
        yield ""
        yield f"not all could be looked at: {found['error']}"
    yield ""
    yield "next"
    if found["would_mend"]:
        yield "  cdc-invalidator run: these rules mend what is left stale"
    elif changed:
        yield "  cdc-invalidator observe: for longer, with all usual jobs; so far nothing is left stale"
    for each in found["would_mend"]:
        yield f"    {each['rule']} (cache {each['cache']}): {each['stale']:,}"
    yield "  cdc-invalidator teardown: if you go no further; else the slot retains WAL"


def _of_rule(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was found of the changes of one rule and cache, and what to do with it."""
    absent, mended, stale, large, skipped = (
        figures.get(name, 0) for name in ("absent", "mended", "stale", "too_large", "skipped")
    )
    if absent:
        yield f"  {absent:,} came when nothing was cached"
    if mended:
        yield f"  {mended:,} found an entry, and the application deleted or changed it"
    if stale:
        yield f"  {stale:,} left an entry stale: {figures['stale_share']:.1%} of those judged"
        yield f"    for {_seconds(figures['stale_median_s'])} (median), {_seconds(figures['stale_max_s'])} at most"
    if large:
        yield f"  {large:,} not judged: the entry takes more than 256 KiB"
    if skipped:
        yield f"  {skipped:,} not judged: too many at once, or from a time without a connection"
    if early := figures["there"] - mended - stale - large - skipped:
        yield f"  {early:,} not judged: the time was over before"
    if stale and figures["stale_share"] >= NEARLY_ALL:
        yield "  -> the application does not delete these keys: the rule mends them"
        yield "     (if the value does not depend on what changed, give the rule `columns` or `when`)"
    elif stale:
        yield "  -> some code path forgets these keys: the rule mends them"
    elif mended:
        yield "  -> the application does it by itself: the rule guards against what somebody will forget"
    elif absent:
        yield "  -> nobody caches these, or the application deletes them at once, or spells the key otherwise:"
        yield "     compare with explain KEY for a key of your Redis"


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _seconds(seconds: float) -> str:
    for name, unit in (("h", 3600), ("min", 60)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"
