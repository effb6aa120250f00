"""Another database that is swapped in under the daemon's connection (SWAPDB), and out again before anyone looks.

What the daemon does in between is done to other data, and nothing shows it afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import redis
from proxy import Proxy
from running import eventually, execute
from stage import Stage

from cdc_invalidator.embedded.process import HOST
from cdc_invalidator.embedded.servers import Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
version: 1
caches:
  thing: {key: "t:thing:{id}", ttl: 5m}
rules:
  - {name: thing-changed, table: public.things, bust: [thing]}
"""
SCHEMA = (
    "CREATE TABLE things (id int PRIMARY KEY, n int)",
    "INSERT INTO things SELECT n, 0 FROM generate_series(1, 9) n",
)


class Swapper(Proxy):
    """Swaps the databases 0 and 1 before some commands of a client, and back behind them.

    Args:
        valkey: The server.
        word: The commands.
        whole: Whether that is done around all that is sent with them.
    """

    def __init__(self, valkey: Valkey, word: str, *, whole: bool) -> None:
        super().__init__(valkey.port)
        self._client: Any = redis.Redis.from_url(valkey.url)
        self._word = word
        self._whole = whole
        # The last argument of the last command that is meant, and how often that is still done.
        self.last = b""
        self.left = 0

    def pieces(self, data: bytes) -> Iterator[bytes]:
        word = self._word.encode()
        if not self.left or word not in data or self.last not in data:
            yield data
            return
        self.left -= 1
        first, end = data.index(word), data.rindex(self.last) + len(self.last)
        if self._whole:
            first, end = 0, len(data)
        done = self._calls() + data.count(word)
        yield data[:first]
        self._client.swapdb(0, 1)
        yield data[first:end]
        eventually(lambda: self._calls() == done, f"{self._word} is done")
        self._client.swapdb(0, 1)
        yield data[end:]

    def _calls(self) -> int:
        found = self._client.info("commandstats").get(f"cmdstat_{self._word.lower()}", {"calls": 0})
        return int(found["calls"])

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._client.close()


@pytest.mark.parametrize("whole", [False, True], ids=["within a round trip", "between two round trips"])
@pytest.mark.parametrize(
    ("word", "last", "times", "statement"),
    [
        ("UNLINK", b"t:thing:1\r\n", 1, "UPDATE things SET n = 1 WHERE id = 1"),
        # The locks are looked for, and then the keys.
        ("SCAN", b"COUNT\r\n$4\r\n1000\r\n", 2, "TRUNCATE things"),
    ],
    ids=["a bust", "a sweep"],
)
def test_what_went_to_a_database_that_was_swapped_in_and_out_again_is_done_once_more(
    database: str, tmp_path: Path, slot_name: str, word: str, last: bytes, times: int, statement: str, whole: bool
) -> None:
    execute(database, *SCHEMA)
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    with (
        Valkey() as valkey,
        Swapper(valkey, word, whole=whole) as swapper,
        redis.Redis.from_url(valkey.url) as client,
        Stage.playing(database, f"redis://{HOST}:{swapper.port}/0", rules, slot_name, client=client) as stage,
    ):
        stage.cache("t:thing:1")
        swapper.last, swapper.left = last, times
        execute(database, statement)
        eventually(lambda: not swapper.left, "it has been swapped")
        stage.settle()
        assert not stage.cached("t:thing:1")
        assert stage.daemon.named("redis_unavailable", code="OTHER_DATA")
