"""`observe`: the closing report of a daemon that has observed for a while. Pure.

The figures are those of `Observe.status`, which /status shows while the daemon runs; here they are put into words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cdc_invalidator import errors


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
    """Yield the lines of a closing report as text."""
    yield f"observed for {_seconds(found['observed_s'])}"
    changed = [each for each in found["caches"] if each.get("changes")]
    if not changed:
        yield "no change has met a rule"
    for each in changed:
        yield ""
        yield f"cache {each['cache']}, rule {each['rule']}:"
        yield f"  {each['changes']:,} keys changed, {each['there']:,} of them were there"
        if each.get("stale"):
            now = f"{each['stale']:,} were left stale ({each['stale_share']:.1%} of those judged)"
            times = f"median {_seconds(each['stale_median_s'])}, longest {_seconds(each['stale_max_s'])}"
            yield f"  {now}: {times}"
        elif each.get("mended"):
            yield f"  none was left stale: the application mended {each['mended']:,}"
        if unknown := each.get("too_large", 0) + each.get("skipped", 0):
            yield f"  {unknown:,} were not looked at"
    for each in found["caches"]:
        if each.get("sweeps"):
            yield f"cache {each['cache']} would have been swept {each['sweeps']:,} times"
    if found["worst"]:
        yield ""
        yield f"stale for longest ({found['stale_now']:,} are stale now):"
    for each in found["worst"]:
        named = each.get("raw_keys") or each.get("key_hashes") or [each.get("key_prefix", "")]
        yield (
            f"  {_seconds(each['stale_s'])}  {named[0]}  cache {each['cache']}, rule {each['rule']}, xid {each['xid']}"
        )
    if found["would_mend"]:
        yield ""
        yield "with CDC_MODE=bust, these rules mend them:"
    for each in found["would_mend"]:
        yield f"  {each['rule']} (cache {each['cache']}): {each['stale']:,}"
    if found["error"]:
        yield ""
        yield f"not all could be looked at: {found['error']}"


def _seconds(seconds: float) -> str:
    for name, unit in (("h", 3600), ("min", 60)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"
