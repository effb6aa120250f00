"""What befalls the daemon, Redis and the ways between them while the application reads and writes."""

from __future__ import annotations

import random
import signal
import threading
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from consistency.stores import Store
    from proxy import Proxy
    from running import RunningDaemon
    from standby import Standby

PAUSE_SECONDS = 3.0
"""Between two faults, at most."""


class Faults:
    """One fault after the other in a thread, until the context is left.

    Args:
        daemon: what is killed and frozen.
        store: the Redis, which knows what befalls it.
        ways: the proxies on the ways to Redis and to PostgreSQL.
        standby: which lags, if readers load from one.
        seed: of the choice.
    """

    def __init__(
        self, daemon: RunningDaemon, store: Store, ways: Sequence[Proxy], standby: Standby | None, seed: int
    ) -> None:
        self._daemon = daemon
        self._store = store
        self._ways = ways
        self._standby = standby
        self._dice = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._failure: Exception | None = None
        self.befell: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def enough(self, wanted: int) -> bool:
        """Whether so many have befallen; raises what has ended them."""
        if self._failure is not None:
            raise self._failure
        return len(self.befell) >= wanted

    def _run(self) -> None:
        kinds: list[Callable[[], None]] = [
            self._kill_daemon,
            self._freeze_daemon,
            self._cut,
            self._stall,
            self._hold,
        ]
        of_store = self._store.faults(self._daemon, self._dice)
        # About as many as the others are.
        kinds += of_store * max(1, len(kinds) // len(of_store))
        if self._standby is not None:
            # Most of the time, or nothing would come of it.
            kinds += [self._lag] * len(kinds)
        try:
            while not self._stop.wait(self._dice.random() * PAUSE_SECONDS):
                # All kinds in a random order, then again in another: a short run meets as many of them as it can.
                at = len(self.befell) % len(kinds)
                if at == 0:
                    self._dice.shuffle(kinds)
                fault = kinds[at]
                fault()
                self.befell.append(fault.__name__.removeprefix("_"))
        except Exception as failure:  # noqa: BLE001  raised again by the main thread
            self._failure = failure

    def _kill_daemon(self) -> None:
        self._daemon.kill()
        time.sleep(self._dice.random())
        self._daemon.start()

    def _freeze_daemon(self) -> None:
        self._daemon.send(signal.SIGSTOP)
        time.sleep(self._dice.random() * 2)
        self._daemon.send(signal.SIGCONT)

    def _cut(self) -> None:
        self._dice.choice(self._ways).cut()

    def _stall(self) -> None:
        way = self._dice.choice(self._ways)
        way.stall()
        time.sleep(self._dice.random() * 3)
        way.mend()

    def _hold(self) -> None:
        """Let new connections pass while the old ones stand; what was asked on those arrives late, and twice."""
        way = self._dice.choice(self._ways)
        way.hold()
        time.sleep(self._dice.random())
        way.mend()

    def _lag(self) -> None:
        """Let the standby show nothing new for a while; at times for longer than busts wait for it."""
        assert self._standby is not None
        self._standby.pause_replay()
        time.sleep(self._dice.random() * 3)
        self._standby.resume_replay()
