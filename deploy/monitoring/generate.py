"""Makes what is derived: dashboard.json from the panels below, prometheusrule.yaml and the chart's copy from rules.yml.

Run it after a change of either: ``python deploy/monitoring/generate.py``. A test holds the files against it.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FOLDER = Path(__file__).parent
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24

# A slot's name is unique on its server only.
SLOT = ("cluster", "namespace", "job", "slot")
OURS = 'namespace=~"$namespace", job=~"$job", slot=~"$slot"'
OF_CACHE = f'{OURS}, cache=~"$cache"'
OF_PROCESS = 'namespace=~"$namespace", job=~"$job"'
# Applications know no slot, and are another job.
OF_READERS = 'namespace=~"$namespace", cache=~"$cache"'

WHY = """
| writes | busted keys that were there, a write | then it is |
| --- | --- | --- |
| more | as before | a **traffic shift**: the application writes more |
| as before | more | a **busting bug**: a rule busts more than it should, or sweeps (*Busted keys by rule*, *Sweeps*) |
| as before | as before | not the busts: evictions, expiries, a cold cache, other keys |
"""
GUIDE = f"""
**Fewer hits: why?** The panel *Traffic shift or busting bug?* shows each figure in times of its average of the day
before; 2 is twice as much. Where writes and busted keys a write both rise, look at the second: it has no other cause.
A reload (blue line) that adds a table adds its writes as well.
{WHY}
Old data in production, and a share of busted keys that were there near 0: the rule's **keys have drifted** from the
application's.

**An alert fires:** its section in `deploy/README.md`, under *Alerts*, says what it means, where to look and what to do.
"""


class Query(NamedTuple):
    """A PromQL expression and its legend; ``right``: it has the right axis, with that unit."""

    expr: str
    legend: str
    right: str = ""


def rate(metric: str, of: str = OURS) -> str:
    """Give a counter's rate."""
    return f"rate(cdc_invalidator_{metric}{{{of}}}[$__rate_interval])"


def rise(metric: str, of: str = OURS) -> str:
    """Give by how much a counter rose."""
    return f"increase(cdc_invalidator_{metric}{{{of}}}[$__rate_interval])"


def first_rise(metric: str, of: str = OURS) -> str:
    """Give by how much a counter rose whose series begin when they are first counted: from 0, which nobody saw."""
    series = f"cdc_invalidator_{metric}{{{of}}}"
    return f"(({series} unless last_over_time({series}[1h] offset $__rate_interval)) or {rise(metric, of)})"


def gauge(metric: str, of: str = OURS) -> str:
    """Give a gauge."""
    return f"cdc_invalidator_{metric}{{{of}}}"


def total(expr: str, *by: str) -> str:
    """Sum up over the daemons of each slot."""
    return f"sum by ({', '.join(SLOT + by)}) ({expr})"


def highest(expr: str, *by: str) -> str:
    """Give what the daemon says that knows: the others say less, or nothing."""
    return f"max by ({', '.join(SLOT + by)}) ({expr})"


def quantile(share: float, *by: str) -> str:
    """Give a quantile of the time from commit to bust."""
    return f"histogram_quantile({share}, {total(rate('commit_to_bust_seconds_bucket', OF_CACHE), *by, 'le')})"


def read(metric: str, *by: str) -> str:
    """Sum up a counter's rate over the applications that read through the library."""
    return f"sum by ({', '.join(('namespace', 'cache', *by))}) ({rate(f'reader_{metric}', OF_READERS)})"


def load_time(share: float) -> str:
    """Give a quantile of the time that readers' loads took."""
    return f"histogram_quantile({share}, {read('load_seconds_bucket', 'le')})"


SERVED = " + ".join(read(f"{kind}_total") for kind in ("hits", "negative_hits", "l1_hits"))
# What the daemons read themselves is not the application's.
HITS, MISSES = (
    f"clamp_min({total(rate(f'redis_keyspace_{kind}_total'))} - {total(rate(f'redis_own_{kind}_total'))}, 0)"
    for kind in ("hits", "misses")
)
BUSTED, EXISTED = total(rate("busted_keys_total", OF_CACHE)), total(rate("busted_keys_existed_total", OF_CACHE))
CHANGES = total(rate("changes_total"))


def observed(results: str) -> str:
    """Give how many changes a daemon that observes has judged so, by the rule that would have busted."""
    return total(rise("observed_total", f'{OF_CACHE}, result=~"{results}"'), "rule", "cache")


def usual(record: str) -> str:
    """Give a recorded rate's average of the day before; of a daemon that is younger than that, of its time."""
    series = f"slot:cdc_invalidator_{record}:rate5m{{{OURS}}}"
    return f"(avg_over_time({series}[1d] offset 30m) or avg_over_time({series}[1d]))"


def recorded(record: str) -> str:
    """Give a rate of the last five minutes that rules.yml records."""
    return f"slot:cdc_invalidator_{record}:rate5m{{{OURS}}}"


ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}
COLORS = {"critical": "red", "warning": "orange"}


def limits(alert: str) -> dict[str, Any]:
    """Give the colours of a figure: green, and that of the alert from its limit on."""
    rule = ALERTS[alert]
    text = rule["expr"]
    found = re.search(r"> ([\d.]+) \* avg_over_time", text) or re.search(r"(?:>|==) ([\d.]+)", text)
    assert found, f"{alert} has no limit"
    # Figures that count things are above 0 from 1 on.
    limit = float(found[1]) or 1
    steps = [{"color": "green", "value": None}, {"color": COLORS[rule["labels"]["severity"]], "value": limit}]
    return {"mode": "absolute", "steps": steps}


def says(alert: str) -> str:
    """Give an alert's summary for all series: labels have columns of their own."""
    text = ALERTS[alert]["annotations"]["summary"]
    text = re.sub(r"{{ if .*? }}(.*?){{ else }}.*?{{ end }}", r"\1", text)
    text = re.sub(r"{{ with .*? }}.*?{{ end }}", "", text)
    text = re.sub(r"\b(Rule|Cache|Daemon) {{ .*? }}", r"This \1", text).replace("This R", "This r")
    text = text.replace("This C", "This c").replace("This D", "This d")
    text = re.sub(r"\b(slot|cache|standby|daemon|rule) {{ .*? }}", r"this \1", text)
    text = re.sub(r" \((?:this slot|{{ .*? }})\)", "", text)
    return text.replace("{{ $labels.error }}", "an error").replace("{{ $labels.wal_status }}", "unreserved or lost")


def remedy(alert: str) -> str:
    """Give the beginning of what the runbook says to do about an alert, as plain text."""
    runbook = (FOLDER.parent / "README.md").read_text()
    section = runbook.partition(f"\n### {alert}\n")[2].partition("\n### ")[0]
    text = section.partition("**Do:**")[2].partition("\n\n|")[0].removesuffix("Find\nthe cause:")
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(text.split())).removeprefix("- ")
    text = text.replace(": - ", ": ").replace("`", "")
    text = text[:1].upper() + text[1:]
    sentences = re.split(r"(?<=\.) (?:- )?", text)
    while len(sentences) > 1 and len(" ".join(sentences)) > MOST_REMEDY:
        sentences.pop()
    return " ".join(sentences)


MOST_REMEDY = 240


def lines(title: str, unit: str, *queries: Query, about: str = "", alert: str = "", **defaults: Any) -> dict[str, Any]:
    """Give a panel of lines over time; ``alert``: the limit of this one is drawn as well."""
    custom = {"drawStyle": "line", "fillOpacity": 10, "showPoints": "never", "spanNulls": False}
    custom |= defaults.pop("custom", {})
    if alert:
        custom["thresholdsStyle"] = {"mode": "dashed"}
        defaults["thresholds"] = limits(alert)
    right = [
        {
            "matcher": {"id": "byFrameRefID", "options": chr(ord("A") + at)},
            "properties": [
                {"id": "unit", "value": query.right},
                {"id": "custom.axisPlacement", "value": "right"},
                {"id": "custom.fillOpacity", "value": 0},
            ],
        }
        for at, query in enumerate(queries)
        if query.right
    ]
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return _panel("timeseries", title, unit, queries, about, {"custom": custom, "min": 0, **defaults}, right, options)


def states(title: str, query: Query, names: dict[str, tuple[str, str]], about: str = "") -> dict[str, Any]:
    """Give a panel of states over time; ``names``: for each value what it is called, and its colour."""
    mapped = {
        value: {"text": text, "color": color, "index": at} for at, (value, (text, color)) in enumerate(names.items())
    }
    defaults = {"mappings": [{"type": "value", "options": mapped}], "custom": {"fillOpacity": 70, "lineWidth": 0}}
    return _panel(
        "state-timeline", title, "none", (query,), about, defaults, [], {"mergeValues": True, "showValue": "auto"}
    )


def stat(
    title: str,
    unit: str,
    query: Query,
    *,
    alert: str = "",
    names: dict[str, tuple[str, str]] | None = None,
    about: str = "",
    unknown: str = "unknown",
) -> dict[str, Any]:
    """Give a panel of how things are now, with colours from an alert's limit, or by the names of values."""
    mapped = {value: {"text": text, "color": color} for value, (text, color) in (names or {}).items()}
    defaults: dict[str, Any] = {
        "noValue": unknown,
        "thresholds": limits(alert) if alert else {"mode": "absolute", "steps": [{"color": "text", "value": None}]},
        "mappings": [{"type": "value", "options": mapped}] if mapped else [],
    }
    options = {
        "colorMode": "background",
        "graphMode": "none",
        "justifyMode": "center",
        "textMode": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    panel = _panel("stat", title, unit, (query,), about, defaults, [], options)
    panel["targets"][0] |= {"instant": True, "range": False}
    return panel


def alerts(title: str, about: str) -> dict[str, Any]:
    """Give a table of the alerts that fire or are about to: what is wrong, since when, and what to do."""
    chosen = f'alertname=~"CdcInvalidator.*", {OURS}'
    # The value is when it began.
    since = f"ALERTS{{{chosen}}} * ignoring(alertstate) group_left() (1000 * ALERTS_FOR_STATE{{{chosen}}})"
    told = f'label_replace(label_replace({since}, "what", "$1", "alertname", "(.*)"), "do", "$1", "alertname", "(.*)")'
    states = {"firing": {"text": "firing", "color": "red"}, "pending": {"text": "soon", "color": "orange"}}

    def column(name: str, mapped: dict[str, Any], **properties: Any) -> dict[str, Any]:
        mapping = [{"id": "mappings", "value": [{"type": "value", "options": mapped}]}] if mapped else []
        return {
            "matcher": {"id": "byName", "options": name},
            "properties": mapping + [{"id": key, "value": value} for key, value in properties.items()],
        }

    wrapped = {"type": "auto", "wrapText": True}
    colored = {"type": "color-background"}
    columns = ("alertstate", "what", "Value", "do")
    overrides = [
        column("alertstate", states, **{"custom.cellOptions": colored, "custom.width": 80}),
        column(
            "what",
            {alert: {"text": says(alert)} for alert in ALERTS},
            **{"custom.cellOptions": wrapped, "custom.width": 380},
        ),
        column("Value", {}, unit="dateTimeFromNow", **{"custom.width": 130}),
        column(
            "do",
            {alert: {"text": remedy(alert)} for alert in ALERTS},
            **{"custom.cellOptions": wrapped, "custom.minWidth": 420},
        ),
    ]
    panel = _panel(
        "table",
        title,
        "none",
        (Query(told, ""),),
        about,
        {"noValue": "No alert fires."},
        overrides,
        {"showHeader": True, "cellHeight": "sm", "sortBy": [{"displayName": "state", "desc": False}]},
    )
    panel["targets"][0] |= {"instant": True, "range": False, "format": "table"}
    hidden = ("Time", "__name__", "alertname", "severity", "cluster", "namespace", "job")
    panel["transformations"] = [
        {
            "id": "organize",
            "options": {
                "excludeByName": dict.fromkeys(hidden, True),
                "indexByName": {name: at for at, name in enumerate(columns)},
                "renameByName": {"alertstate": "state", "what": "what is wrong", "Value": "since", "do": "what to do"},
            },
        }
    ]
    return panel


def table(title: str, *queries: Query, about: str = "", hidden: tuple[str, ...] = ()) -> dict[str, Any]:
    """Give a table of the labels that series have now."""
    panel = _panel("table", title, "none", queries, about, {}, [], {"showHeader": True})
    for target in panel["targets"]:
        target |= {"instant": True, "range": False, "format": "table"}
    panel["transformations"] = [{"id": "organize", "options": {"excludeByName": dict.fromkeys(hidden, True)}}]
    return panel


def _panel(
    kind: str,
    title: str,
    unit: str,
    queries: tuple[Query, ...],
    about: str,
    defaults: dict[str, Any],
    overrides: list[Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + at), "datasource": DATASOURCE, "expr": query.expr, "legendFormat": query.legend}
        for at, query in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": unit, **defaults}, "overrides": overrides},
        "options": options,
        "targets": targets,
    }


def sized(width: int, height: int, panel: dict[str, Any]) -> dict[str, Any]:
    """Give a panel that is not as large as others of its kind."""
    return {**panel, "size": (width, height)}


LEADS = highest(gauge("leader"))
# It goes on while nobody leads.
AGE = "time() - " + highest("last_over_time(" + gauge("watermark_as_of_timestamp_seconds") + "[1h])")
NONE = f"0 * {LEADS}"

ROWS: dict[str, list[dict[str, Any]]] = {
    "Is it well?": [
        stat(
            "Leader",
            "none",
            Query(f"{LEADS} or -group by ({', '.join(SLOT)}) (last_over_time({gauge('leader')}[1h]))", "{{slot}}"),
            names={"-1": ("not scraped", "red"), "0": ("nobody leads", "red"), "1": ("there", "green")},
            unknown="no daemon",
        ),
        stat(
            "Caches are at most so old",
            "s",
            Query(AGE, "{{slot}}"),
            alert="CdcInvalidatorWatermarkOld",
            about="The age of the watermark: all commits before that time are busted. A second or two is usual.",
        ),
        stat(
            "Redis",
            "none",
            Query(highest(gauge("redis_up")), "{{slot}}"),
            names={"0": ("away", "red"), "1": ("there", "green")},
            about="The leader's connection.",
            unknown="no leader tells",
        ),
        stat(
            "PostgreSQL",
            "none",
            Query(highest(gauge("postgres_up")), "{{slot}}"),
            names={"0": ("away", "orange"), "1": ("there", "green")},
        ),
        stat(
            "Caches with an open gap",
            "none",
            Query(highest(gauge("gaps_open")), "{{slot}}"),
            alert="CdcInvalidatorGapOpen",
            about="The watermark leaves them out until they are swept, and the transactions of that time are over.",
        ),
        stat(
            "Caches that Redis denies",
            "none",
            Query(f"sum by ({', '.join(SLOT)}) ({highest(gauge('cache_denied'), 'cache')}) or {NONE}", "{{slot}}"),
            alert="CdcInvalidatorCacheDenied",
            about="A right is missing: they show old data.",
        ),
        stat(
            "Commit to bust, p99 now",
            "s",
            Query(
                f"max by ({', '.join(SLOT)}) (" + quantile(0.99, "cache").replace("$__rate_interval", "5m") + " > 0)",
                "{{slot}}",
            ),
            alert="CdcInvalidatorSlowBusts",
            unknown="no busts",
            about="Of the slowest cache, within 5 minutes.",
        ),
        stat(
            "No bust got through for",
            "s",
            Query(highest(gauge("blocked_seconds")), "{{slot}}"),
            alert="CdcInvalidatorBlocked",
            about="Whatever it waits for: /readyz and last_error in /status of the leader say what.",
            unknown="no leader tells",
        ),
        sized(
            24,
            7,
            alerts(
                "What is wrong, since when, what to do",
                "The alerts of rules.yml that fire, or soon will. The rest is in deploy/README.md, under Alerts.",
            ),
        ),
    ],
    "Fewer hits: why?": [
        sized(
            24,
            9,
            lines(
                "Traffic shift or busting bug?",
                "suffix:x",
                Query(f"{recorded('changes')} / {usual('changes')}", "{{slot}} writes"),
                Query(
                    f"({recorded('busted_keys_existed')} / {recorded('changes')})"
                    f" / ({usual('busted_keys_existed')} / {usual('changes')})",
                    "{{slot}} busted keys that were there, a write",
                ),
                Query(f"{recorded('redis_hit_ratio')} / {usual('redis_hit_ratio')}", "{{slot}} hit rate"),
                about="Each in times of its average of the day before. " + WHY.strip(),
                alert="CdcInvalidatorHitRateFellWithBusts",
                custom={"scaleDistribution": {"type": "log", "log": 2}, "axisSoftMin": 0.5, "axisSoftMax": 4},
                min=None,
            ),
        ),
        lines(
            "Redis hit rate",
            "percentunit",
            Query(f"{HITS} / ({HITS} + {MISSES})", "{{slot}}"),
            about="Of all clients of this Redis but the daemon.",
            max=1,
        ),
        lines("Busted keys that were there", "cps", Query(EXISTED, "{{slot}}"), about="Only these can cost a hit."),
        lines(
            "Writes",
            "cps",
            Query(CHANGES, "{{slot}} changes matched"),
            Query(total(rate("database_rows_written_total")), "{{slot}} rows written, the whole database"),
        ),
        lines("Keys busted a change", "short", Query(f"{BUSTED} / {CHANGES}", "{{slot}}")),
        lines("Share of busted keys that were there", "percentunit", Query(f"{EXISTED} / {BUSTED}", "{{slot}}"), max=1),
        lines(
            "Keys that Redis drops by itself",
            "cps",
            Query(total(rate("redis_evicted_keys_total")), "{{slot}} evicted"),
            Query(total(rate("redis_expired_keys_total")), "{{slot}} expired"),
        ),
    ],
    "The feed": [
        lines(
            "Watermark age",
            "s",
            Query(
                AGE,
                "{{slot}} all older commits are busted",
            ),
            Query(f"time() - {highest(gauge('watermark_timestamp_seconds') + ' > 0')}", "{{slot}} last written"),
            about="It is written every second, also while nothing changes, or while busts lag.",
            alert="CdcInvalidatorWatermarkOld",
        ),
        lines(
            "Commit to bust",
            "s",
            *(Query(quantile(share), f"{{{{slot}}}} p{share * 100:.0f}") for share in (0.5, 0.95, 0.99)),
            alert="CdcInvalidatorSlowBusts",
        ),
        lines(
            "Commit to bust, p99 by cache",
            "s",
            Query(quantile(0.99, "cache"), "{{slot}} {{cache}}"),
            alert="CdcInvalidatorSlowBusts",
        ),
        states(
            "Who leads",
            Query(gauge("leader"), "{{slot}} {{instance}}"),
            {"0": ("standby", "blue"), "1": ("leader", "green")},
        ),
        states(
            "Who could lead",
            Query(gauge("can_lead"), "{{slot}} {{instance}}"),
            {"0": ("could not", "red"), "1": ("could", "green")},
            about="Whether PostgreSQL and Redis answer each daemon: one that stands by and could not is of no help.",
        ),
        lines(
            "Leader changes and sessions",
            "short",
            Query(total(rise("handovers_total"), "reason"), "{{slot}} handed over: {{reason}}"),
            Query(total(f"changes({gauge('leader')}[$__rate_interval])"), "{{slot}} leader changes"),
            Query(total(rise("postgres_connects_total")), "{{slot}} streams opened"),
        ),
        lines(
            "Backlog",
            "short",
            Query(total(gauge("backlog_keys")), "{{slot}} keys"),
            Query(
                f"{highest(gauge('received_lsn'))} - {highest(gauge('confirmed_lsn'))}",
                "{{slot}} received and not confirmed",
                right="bytes",
            ),
        ),
        lines(
            "WAL that PostgreSQL keeps",
            "bytes",
            Query(highest(gauge("retained_wal_bytes")), "{{slot}} kept"),
            Query(highest(gauge("retained_wal_limit_bytes")), "{{slot}} CDC_MAX_RETAINED_WAL"),
        ),
        states(
            "The slot's wal_status",
            Query(highest(gauge("slot_wal_status"), "wal_status"), "{{slot}} {{wal_status}}"),
            {"1": ("yes", "blue")},
            about="reserved and extended are well; unreserved is about to be lost.",
        ),
        states(
            "Standbys that readers use",
            Query(highest(gauge("standby_awaited"), "standby"), "{{slot}} {{standby}}"),
            {"0": ("dropped", "red"), "1": ("awaited", "green")},
        ),
    ],
    "Busts": [
        lines("Busts by cache", "cps", Query(total(rate("busts_total", OF_CACHE), "cache"), "{{slot}} {{cache}}")),
        lines(
            "Busted keys by rule",
            "cps",
            Query(
                total(rate("busted_keys_total", OF_CACHE), "rule", "cache", "action"),
                "{{slot}} {{rule}}: {{action}} {{cache}}",
            ),
            about="A rule without a name: a gap's sweeps, and busts by hand.",
        ),
        lines(
            "Keys busted, and those that were there",
            "cps",
            Query(total(rate("busted_keys_total", OF_CACHE), "cache"), "{{slot}} {{cache}} busted"),
            Query(total(rate("busted_keys_existed_total", OF_CACHE), "cache"), "{{slot}} {{cache}} were there"),
        ),
        lines(
            "Changes by table",
            "cps",
            Query(total(rate("changes_total"), "table", "op"), "{{slot}} {{table}} {{op}}"),
        ),
        lines(
            "Sweeps",
            "short",
            Query(
                total(first_rise("sweeps_total", OF_CACHE), "cache", "reason"),
                "{{slot}} {{cache}} because of {{reason}}",
            ),
            Query(total(gauge("sweeps_running")), "{{slot}} running"),
            Query(total(gauge("search_prefixes")), "{{slot}} prefixes searched for"),
            Query(total(rate("sweep_scanned_keys_total", OF_CACHE)), "{{slot}} keys looked at", right="cps"),
            Query(total(rate("search_scanned_keys_total")), "{{slot}} keys looked at by searches", right="cps"),
        ),
        lines(
            "Busted again, and asked for",
            "cps",
            Query(total(rate("busted_again_total"), "reason"), "{{slot}} transactions again: {{reason}}"),
            Query(total(rate("via_queries_total"), "rule"), "{{slot}} queries of {{rule}}"),
            Query(total(rate("messages_total", OF_CACHE), "cache"), "{{slot}} messages about {{cache}}"),
        ),
    ],
    "Observed instead of busted (CDC_MODE=observe)": [
        lines(
            "Share of entries left stale",
            "percentunit",
            Query(f"{observed('stale')} / {observed('stale|mended')}", "{{slot}} {{rule}}: {{cache}}"),
            max=1,
            about="Of the entries that changes have met and that are judged: the rest, the application has mended.",
        ),
        lines(
            "What changes have met",
            "short",
            Query(observed("stale"), "{{slot}} {{rule}}: {{cache}} left stale"),
            Query(observed("mended"), "{{slot}} {{rule}}: {{cache}} mended by the application"),
            Query(observed("absent"), "{{slot}} {{rule}}: {{cache}} absent"),
            Query(observed("skipped|too_large"), "{{slot}} {{rule}}: {{cache}} not judged"),
            about="With CDC_MODE=bust, the rule mends what is left stale.",
        ),
        lines(
            "For how long entries were stale",
            "s",
            Query(
                total(rise("observed_stale_seconds_total", OF_CACHE), "rule", "cache"), "{{slot}} {{rule}}: {{cache}}"
            ),
            about="The sum over the entries that are gone or filled anew since.",
        ),
    ],
    "Redis and PostgreSQL": [
        lines("Hits and misses", "cps", Query(HITS, "{{slot}} hits"), Query(MISSES, "{{slot}} misses")),
        lines(
            "Memory beside busts",
            "bytes",
            Query(highest(gauge("redis_used_memory_bytes")), "{{slot}} memory"),
            Query(EXISTED, "{{slot}} busted keys that were there", right="cps"),
        ),
        lines(
            "Evictions and expiries beside busts",
            "cps",
            Query(total(rate("redis_evicted_keys_total")), "{{slot}} evicted"),
            Query(total(rate("redis_expired_keys_total")), "{{slot}} expired"),
            Query(EXISTED, "{{slot}} busted keys that were there"),
        ),
        lines(
            "Servers reached",
            "short",
            Query(highest(gauge("postgres_up")), "{{slot}} PostgreSQL"),
            Query(highest(gauge("redis_up")), "{{slot}} Redis"),
            max=1,
        ),
        lines(
            "Errors of the servers",
            "short",
            Query(total(first_rise("redis_errors_total"), "error"), "{{slot}} Redis {{error}}"),
            Query(total(first_rise("postgres_errors_total"), "error"), "{{slot}} PostgreSQL {{error}}"),
        ),
    ],
    "Gaps and rules": [
        lines("Gaps", "short", Query(total(first_rise("gaps_total"), "reason"), "{{slot}} {{reason}}")),
        lines(
            "Time since the last gap",
            "s",
            Query(f"time() - {highest(gauge('gap_timestamp_seconds'), 'reason')}", "{{slot}} {{reason}}"),
            about="Also of one that was before the first scrape.",
        ),
        lines(
            "Caches with an open gap, and denied ones",
            "short",
            Query(highest(gauge("gaps_open")), "{{slot}}"),
            Query(highest(gauge("cache_denied", OF_CACHE), "cache"), "{{slot}} {{cache}} denied by Redis"),
            about="The watermark leaves them out until they are swept, and the transactions of that time are over.",
        ),
        lines(
            "Fills that a bust overtook",
            "short",
            Query(
                total(rise("verified_total", f'{OF_CACHE}, result="overtaken"'), "cache"),
                "{{slot}} {{cache}} overtaken",
            ),
            Query(
                total(rise("verified_total", f'{OF_CACHE}, result=~"refilled|empty|unaffected"'), "cache"),
                "{{slot}} {{cache}} fresh",
            ),
            about="Among the busts that CDC_VERIFY_SAMPLE samples: old content came back after them, or not.",
        ),
        lines(
            "Events that nobody took",
            "short",
            Query(total(rise("events_dropped_total")), "{{slot}} lines dropped: nobody reads the log"),
            Query(total(rise("event_stream_refused_total")), "{{slot}} refused by the event stream's Redis"),
        ),
        lines("Rule errors", "short", Query(total(rise("rule_errors_total"), "rule"), "{{slot}} {{rule}}")),
        lines("Reloads", "short", Query(total(rise("reloads_total"), "result"), "{{slot}} {{result}}")),
        states(
            "Rules in force",
            Query(gauge("reload_successful"), "{{slot}} {{instance}}"),
            {"0": ("old ones: mistakes in the new", "red"), "1": ("as in the files", "green")},
        ),
        table(
            "Versions and rule sets",
            Query(
                f"{gauge('build_info')} * on (namespace, job, instance, slot) group_left (digest)"
                f" {gauge('rule_set_info')}",
                "",
            ),
            hidden=("Time", "Value", "job"),
            about="Daemons of one slot should have one digest.",
        ),
    ],
    "Readers that use the library": [
        lines(
            "Hit rate beside busts",
            "percentunit",
            Query(f"({SERVED}) / ({SERVED} + {read('misses_total')})", "{{cache}} hit rate"),
            Query(
                f"sum by (namespace, cache) ({rate('busted_keys_existed_total', OF_CACHE)})",
                "{{cache}} busted keys that were there",
                right="cps",
            ),
            max=1,
            about="Of the applications that hand a registry to cdc_invalidator.reader.",
        ),
        lines(
            "Fills, and those that a bust overtook",
            "cps",
            Query(read("fills_total"), "{{cache}} stored"),
            Query(read("dropped_fills_total"), "{{cache}} dropped"),
            about="Each dropped one would have been a stale entry.",
        ),
        lines(
            "Time to load",
            "s",
            *(Query(load_time(share), f"{{{{cache}}}} p{share * 100:.0f}") for share in (0.5, 0.99)),
        ),
        lines(
            "Reads that waited for another's load",
            "cps",
            Query(read("waits_total"), "{{cache}} waited"),
            Query(read("stale_hits_total"), "{{cache}} shown the old value instead"),
        ),
        lines(
            "Reads beside the cache",
            "cps",
            Query(read("bypasses_total", "reason"), "{{cache}} {{reason}}"),
        ),
        lines(
            "Loaded before the time was up",
            "cps",
            Query(read("early_refreshes_total"), "{{cache}}"),
        ),
    ],
    "The daemons' processes": [
        lines(
            "CPU",
            "percentunit",
            Query(f"rate(process_cpu_seconds_total{{{OF_PROCESS}}}[$__rate_interval])", "{{instance}}"),
        ),
        lines("Memory", "bytes", Query(f"process_resident_memory_bytes{{{OF_PROCESS}}}", "{{instance}}")),
        lines("Open files", "short", Query(f"process_open_fds{{{OF_PROCESS}}}", "{{instance}}")),
    ],
}


def placed() -> list[dict[str, Any]]:
    """Give all panels with their ids and places: each row's under its title, from left to right."""
    panels: list[dict[str, Any]] = []
    y = 0

    def place(panel: dict[str, Any], x: int, width: int, height: int) -> None:
        panels.append({"id": len(panels) + 1, **panel, "gridPos": {"x": x, "y": y, "w": width, "h": height}})

    text = {"type": "text", "title": "", "options": {"mode": "markdown", "content": GUIDE.strip()}}
    for title, row in {**ROWS, "How to read this": [sized(COLUMNS, 9, text)]}.items():
        place({"type": "row", "title": title, "collapsed": False, "panels": []}, 0, COLUMNS, 1)
        y += 1
        x = tallest = 0
        for given in row:
            panel = dict(given)
            width, height = panel.pop("size", (3, 4) if panel["type"] == "stat" else (8, 8))
            if x + width > COLUMNS:
                x, y = 0, y + tallest
                tallest = 0
            place(panel, x, width, height)
            x, tallest = x + width, max(tallest, height)
        y += tallest
    return panels


def mark(name: str, color: str, expr: str, text: str, *, at_value: bool = False) -> dict[str, Any]:
    """Give what is drawn as vertical lines: when the expression has a value, or at the time that it gives (in ms)."""
    return {
        "name": name,
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": color,
        "expr": expr,
        "titleFormat": name,
        "textFormat": text,
        "useValueForTime": at_value,
    }


def marks() -> list[dict[str, Any]]:
    """Give the events that explain what lines do."""
    leads = f"{gauge('leader')} == 1"
    # A session that begins anew is none.
    led = f"max_over_time({gauge('leader')}[$__rate_interval] offset $__rate_interval) == 1"
    return [
        mark(
            "Reload",
            "blue",
            total(rise("reloads_total", f'{OURS}, result!="unchanged"'), "result") + " > 0",
            "{{slot}}: rules reloaded: {{result}}",
        ),
        mark(
            "Gap",
            "orange",
            f"1000 * {highest(gauge('gap_timestamp_seconds'), 'reason')}",
            "{{slot}}: changes may have been missed: {{reason}}",
            at_value=True,
        ),
        mark("New leader", "purple", f"{leads} unless {led}", "{{slot}}: {{instance}} leads"),
    ]


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """Give a variable of the dashboard; all of its values are chosen at first."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        # Also what has no such label, as outside of Kubernetes.
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def dashboard() -> dict[str, Any]:
    """Give the dashboard as Grafana imports it."""
    return {
        "uid": "cdc-invalidator",
        "title": "cdc-invalidator",
        "description": "Which keys are busted, how soon, and whether that is why the hit rate fell.",
        "tags": ["cdc-invalidator"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "annotations": {"list": marks()},
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                    "current": {},
                },
                variable("namespace", "Namespace", "label_values(cdc_invalidator_leader, namespace)"),
                variable("job", "Job", 'label_values(cdc_invalidator_leader{namespace=~"$namespace"}, job)'),
                variable(
                    "slot", "Slot", 'label_values(cdc_invalidator_leader{namespace=~"$namespace", job=~"$job"}, slot)'
                ),
                variable("cache", "Cache", f"label_values(cdc_invalidator_busts_total{{{OURS}}}, cache)"),
            ]
        },
        "panels": placed(),
    }


def prometheusrule() -> str:
    """Give the rules in the form that the Prometheus Operator takes."""
    comments, groups = (FOLDER / "rules.yml").read_text().split("groups:\n")
    return (
        "# Made of rules.yml by generate.py; change that.\n"
        "apiVersion: monitoring.coreos.com/v1\n"
        "kind: PrometheusRule\n"
        "metadata:\n"
        "  name: cdc-invalidator\n"
        "  labels:\n"
        "    app.kubernetes.io/name: cdc-invalidator\n"
        f"spec:\n{textwrap.indent(comments, '  ')}  groups:\n{textwrap.indent(groups, '  ')}"
    )


FILES = {
    "dashboard.json": lambda: json.dumps(dashboard(), indent=1) + "\n",
    "prometheusrule.yaml": prometheusrule,
    # A chart holds all that it needs.
    "../helm/cdc-invalidator/files/rules.yml": (FOLDER / "rules.yml").read_text,
}


if __name__ == "__main__":
    for name, make in FILES.items():
        (FOLDER / name).write_text(make())
