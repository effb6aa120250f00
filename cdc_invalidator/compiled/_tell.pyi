from collections.abc import Callable, Sequence
from typing import Any

from cdc_invalidator.pipeline.batch import BustEvent, Target

class Total:
    target: Target
    action: str
    lines: int
    keys: int
    existed: int
    lag_us: int
    @property
    def lags(self) -> list[int]: ...

class Teller:
    def __init__(
        self,
        keyed: Any,
        bounds: Sequence[float],
        begin: Callable[[dict[str, str | None]], bytes],
        second: Callable[[int], str],
        epoch_us: int,
    ) -> None: ...
    def busted(
        self,
        events: list[BustEvent],
        existed: list[int],
        versions: dict[bytes, int],
        replay_until: int,
        now_us: int,
        missing: int,
    ) -> tuple[bytes, list[Total]]: ...
