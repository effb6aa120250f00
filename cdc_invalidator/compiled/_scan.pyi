from collections.abc import MutableMapping, Sequence

from cdc_invalidator.pipeline.batch import BustEvent, Target
from cdc_invalidator.pipeline.scan import PlainRules, Plans

class Table:
    def __init__(
        self,
        name: str,
        identity: Sequence[bool],
        inserts: PlainRules,
        updates: PlainRules,
        deletes: PlainRules,
        counts: MutableMapping[tuple[str, str], int],
    ) -> None: ...

def whole(data: bytes) -> int: ...
def transactions(
    data: bytes, pos: int, plans: Plans, event_type: type[BustEvent], limit: int
) -> tuple[int, int, int, list[BustEvent], list[int]]: ...
def rows(
    data: bytes, pos: int, plans: Plans, own_plans: Plans, in_stream: bool, limit: int
) -> tuple[int, int, int | None, list[tuple[Target, str, list[bytes]]]]: ...
