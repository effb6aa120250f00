"""A pytest plugin: the fixture ``cdc_caches``, an application's own caches over an empty stand-in for Redis.

pytest imports this module in every run where the package is installed, so it imports nothing else until it is used.
See reader/TESTING.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the setting."""
    parser.addini("cdc_caches", "the Caches or AsyncCaches for the fixture `cdc_caches`, as module:name")


@pytest.fixture
def cdc_caches(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The application's caches, which are in memory and empty for this test; functions that they decorate, too."""
    import pkgutil  # noqa: PLC0415  see the module

    from cdc_invalidator.reader import testing  # noqa: PLC0415

    where = request.config.getini("cdc_caches")
    if not where:
        raise pytest.UsageError(
            "the fixture cdc_caches does not know your caches; write `cdc_caches = shop.cache:caches` into pytest's "
            "configuration"
        )
    with testing.in_memory(pkgutil.resolve_name(where)) as caches:
        yield caches
