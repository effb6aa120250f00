"""Two tables, and a cache of each: what befalls the one must leave the other alone."""

from __future__ import annotations

RULES = """
version: 1
caches:
  thing: {key: "t:thing:{id}", ttl: 5m}
  other: {key: "t:other:{id}", ttl: 5m}
rules:
  - {name: thing-changed, table: public.things, bust: [thing]}
  - {name: other-changed, table: public.others, bust: [other]}
"""
SCHEMA = (
    "CREATE TABLE things (id int PRIMARY KEY, n int)",
    "CREATE TABLE others (id int PRIMARY KEY, n int)",
    "INSERT INTO things SELECT n, 0 FROM generate_series(1, 99) n",
    "INSERT INTO others SELECT n, 0 FROM generate_series(1, 99) n",
)
