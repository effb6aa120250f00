from collections.abc import MutableMapping, Sequence

from cdc_invalidator.pipeline.batch import Line, Target
from cdc_invalidator.pipeline.scan import Plans, Rules

class Table:
    def __init__(
        self,
        name: str,
        identity: Sequence[bool],
        inserts: Rules,
        updates: Rules,
        deletes: Rules,
        counts: MutableMapping[tuple[str, str], int],
    ) -> None: ...

def whole(data: bytes) -> int: ...
def transactions(
    data: bytes, pos: int, plans: Plans, line_type: type[Line], limit: int
) -> tuple[int, int, int, list[Line], list[int]]: ...
def rows(
    data: bytes, pos: int, plans: Plans, own_plans: Plans, in_stream: bool, limit: int
) -> tuple[int, int, int | None, list[tuple[Target, str, list[bytes]]]]: ...
