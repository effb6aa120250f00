"""`CDC_MODE=observe`: its figures against a comparison of Redis with the database, with an application under load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from forgetful import PATIENCE, SAME_LATE, Forgetful, figures, judged, observer, place
from running import eventually

if TYPE_CHECKING:
    from pathlib import Path

WRITES = 1500


@pytest.mark.parametrize("at", ["single", "sentinel", "cluster"])
def test_what_an_application_forgets_under_load_is_told_to_one_per_cent(
    database: str, at: str, tmp_path: Path, slot_name: str
) -> None:
    with (
        place(at) as (url, client),
        Forgetful(database, client, count=WRITES, seed=1) as application,
        observer(application, url, tmp_path, slot_name, grace=3) as daemon,
    ):
        daemon.seen("redis_connected")
        application.fill()
        application.write(application.items)
        eventually(lambda: judged(daemon, WRITES), "all are judged", PATIENCE)
        truth = application.stale()
        told = {event["raw_keys"][0] for event in daemon.named("stale")}
        assert 0.05 * WRITES < len(truth) < 0.15 * WRITES
        # None that was filled with other content, or soon with the same.
        falsely = {key for key in told - truth if application.done[key] != SAME_LATE}
        assert not falsely, [application.done[key] for key in falsely]
        assert len(truth - told) <= 0.01 * len(truth)
        assert figures(daemon)["stale"] == len(told)
