"""Makes what is derived: dashboard.json from the panels below, prometheusrule.yaml and the chart's copy from rules.yml.

Run it after a change of either: ``python deploy/monitoring/generate.py``. A test holds the files against it.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

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

GUIDE = """
**Fewer hits: why?** Read from left to right.

| busted keys that were there | writes | keys busted a change | then it is |
| --- | --- | --- | --- |
| more | more | as before | a **traffic shift**: the application writes more |
| more | as before | more | a **busting bug**: a rule busts more than it should, or sweeps (see *Busts*, *Sweeps*) |
| as before | as before | as before | not the busts: evictions, expiries, a cold cache, other keys |

Old data in production, and a share of busted keys that were there near 0: the rule's **keys have drifted** from the
application's.
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


def lines(title: str, unit: str, *queries: Query, about: str = "", **defaults: Any) -> dict[str, Any]:
    """Give a panel of lines over time."""
    custom = {"drawStyle": "line", "fillOpacity": 10, "showPoints": "never", "spanNulls": False}
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


def table(title: str, *queries: Query, about: str = "") -> dict[str, Any]:
    """Give a table of the labels that series have now."""
    panel = _panel("table", title, "none", queries, about, {}, [], {"showHeader": True})
    for target in panel["targets"]:
        target |= {"instant": True, "range": False, "format": "table"}
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


ROWS: dict[str, list[dict[str, Any]]] = {
    "Traffic shift or busting bug?": [
        lines("Redis hit rate", "percentunit", Query(f"{HITS} / ({HITS} + {MISSES})", "{{slot}}"), max=1),
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
                f"time() - {highest(gauge('watermark_as_of_timestamp_seconds'))}",
                "{{slot}} all older commits are busted",
            ),
            Query(f"time() - {highest(gauge('watermark_timestamp_seconds') + ' > 0')}", "{{slot}} last written"),
            about="It is written every second, also while nothing changes, or while busts lag.",
        ),
        lines(
            "Commit to bust",
            "s",
            *(Query(quantile(share), f"{{{{slot}}}} p{share * 100:.0f}") for share in (0.5, 0.95, 0.99)),
        ),
        lines("Commit to bust, p99 by cache", "s", Query(quantile(0.99, "cache"), "{{slot}} {{cache}}")),
        states(
            "Who leads",
            Query(gauge("leader"), "{{slot}} {{instance}}"),
            {"0": ("standby", "blue"), "1": ("leader", "green")},
        ),
        lines(
            "Leader changes and sessions",
            "short",
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
                total(rise("sweeps_total", OF_CACHE), "cache", "reason"),
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
            Query(total(rise("redis_errors_total"), "error"), "{{slot}} Redis {{error}}"),
            Query(total(rise("postgres_errors_total"), "error"), "{{slot}} PostgreSQL {{error}}"),
        ),
    ],
    "Gaps and rules": [
        lines("Gaps", "short", Query(total(rise("gaps_total"), "reason"), "{{slot}} {{reason}}")),
        lines(
            "Time since the last gap",
            "s",
            Query(f"time() - {highest(gauge('gap_timestamp_seconds'), 'reason')}", "{{slot}} {{reason}}"),
            about="Also of one that was before the first scrape.",
        ),
        lines(
            "Caches with an open gap",
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
        lines("Rule errors", "short", Query(total(rise("rule_errors_total"), "rule"), "{{slot}} {{rule}}")),
        lines("Reloads", "short", Query(total(rise("reloads_total"), "result"), "{{slot}} {{result}}")),
        states(
            "Rules in force",
            Query(gauge("reload_successful"), "{{slot}} {{instance}}"),
            {"0": ("old ones: mistakes in the new", "red"), "1": ("as in the files", "green")},
        ),
        table(
            "Versions and rule sets",
            Query(gauge("build_info"), ""),
            Query(gauge("rule_set_info"), ""),
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
    """Give all panels with their ids and places: each row's under its title, three abreast."""
    panels: list[dict[str, Any]] = []
    y = 0

    def place(panel: dict[str, Any], x: int, width: int, height: int) -> None:
        panels.append({"id": len(panels) + 1, **panel, "gridPos": {"x": x, "y": y, "w": width, "h": height}})

    for title, row in ROWS.items():
        place({"type": "row", "title": title, "collapsed": False, "panels": []}, 0, COLUMNS, 1)
        y += 1
        if y == 1:
            place(
                {"type": "text", "title": "", "options": {"mode": "markdown", "content": GUIDE.strip()}}, 0, COLUMNS, 7
            )
            y += 7
        for at, panel in enumerate(row):
            place(panel, at % 3 * 8, 8, 8)
            if at % 3 == 2 or at == len(row) - 1:
                y += 8
    return panels


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
        "annotations": {"list": []},
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
