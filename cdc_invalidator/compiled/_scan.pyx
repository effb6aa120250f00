# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The common case of the data path in one pass: from the bytes of the stream to the keys of plain rules. See `scan`.

`pgoutput`, `assembly` and `plan` do the same in Python, and are the reference. Whatever is not plain (a message of
another kind, a value that is not sent, a row of another width) is left to them, from the beginning of its transaction
or row. So nothing here ever fails, and nothing is half done.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

cdef enum:
    # What a transaction may have to be taken whole; larger ones go row by row, which is as fast for them.
    MOST_EVENTS = 16
    MOST_KEYS = 32
    MOST_ROWS = 64
    # PostgreSQL's limit is 1,600 columns.
    MOST_COLUMNS = 1664
    # Sizes: a CopyData message's tag and length; XLogData's tag, start, end and send time; Begin and Commit.
    COPY = 5
    XLOG = 25
    BEGIN = 21
    COMMIT = 26

cdef enum Op:
    INSERT = 0
    UPDATE = 1
    DELETE = 2

cdef tuple _OPS = ("insert", "update", "delete")

cdef enum Kind:
    NULL_VALUE = 0
    TEXT = 1
    NOT_SENT = 2

cdef struct Value:
    const uint8_t* at
    Py_ssize_t size
    Kind kind

cdef enum Old:
    # What is known of an old row; as in plan._Firing.
    GIVEN = 0
    KEPT = 1
    IGNORED = 2

_MODES = {"given": GIVEN, "kept": KEPT, "ignore": IGNORED}

# Of the row in hand: this is one thread's, and never left in between.
cdef Value _new[MOST_COLUMNS]
cdef Value _old[MOST_COLUMNS]


# Below, `noexcept` stands only where `nogil` does: what touches no Python object has nothing to raise.


cdef inline uint16_t u16(const uint8_t* at) noexcept nogil:
    return (<uint16_t>at[0] << 8) | at[1]


cdef inline uint32_t u32(const uint8_t* at) noexcept nogil:
    return (<uint32_t>at[0] << 24) | (<uint32_t>at[1] << 16) | (<uint32_t>at[2] << 8) | at[3]


cdef inline uint64_t u64(const uint8_t* at) noexcept nogil:
    return (<uint64_t>u32(at) << 32) | u32(at + 4)


cdef class _Firing:
    """One target of a rule: how its key is made, and what is known of old rows."""

    cdef object target
    cdef object action
    cdef tuple literals
    cdef int* columns
    cdef Py_ssize_t count
    cdef Old old

    def __cinit__(self, target, literals, columns, old):
        self.target = target
        self.action = target.action
        self.literals = tuple(literals)
        self.count = len(columns)
        self.columns = <int*>PyMem_Malloc(max(1, self.count) * sizeof(int))
        if self.columns is NULL:
            raise MemoryError
        for at, column in enumerate(columns):
            self.columns[at] = column
        self.old = _MODES[old]

    def __dealloc__(self):
        PyMem_Free(self.columns)

    cdef bint sent(self, Value* row) except -1:
        """Whether all values of the key were sent."""
        cdef Py_ssize_t at
        for at in range(self.count):
            if row[self.columns[at]].kind == NOT_SENT:
                return False
        return True

    cdef object key(self, Value* row):
        """The key, or None where a parameter is NULL."""
        cdef Py_ssize_t at, size = PyBytes_GET_SIZE(self.literals[0])
        cdef Value* value
        for at in range(self.count):
            value = &row[self.columns[at]]
            if value.kind == NULL_VALUE:
                return None
            size += value.size + PyBytes_GET_SIZE(self.literals[at + 1])
        key = PyBytes_FromStringAndSize(NULL, size)
        cdef char* to = PyBytes_AS_STRING(key)
        literal = self.literals[0]
        memcpy(to, PyBytes_AS_STRING(literal), PyBytes_GET_SIZE(literal))
        to += PyBytes_GET_SIZE(literal)
        for at in range(self.count):
            value = &row[self.columns[at]]
            memcpy(to, value.at, value.size)
            to += value.size
            literal = self.literals[at + 1]
            memcpy(to, PyBytes_AS_STRING(literal), PyBytes_GET_SIZE(literal))
            to += PyBytes_GET_SIZE(literal)
        return key


cdef class _Rule:
    """One rule: its targets, and the columns of which an UPDATE must change one (none: any)."""

    cdef list firings
    cdef int* compared
    cdef Py_ssize_t count

    def __cinit__(self, compared, firings):
        self.firings = [_Firing(*firing) for firing in firings]
        self.count = len(compared)
        self.compared = <int*>PyMem_Malloc(max(1, self.count) * sizeof(int))
        if self.compared is NULL:
            raise MemoryError
        for at, column in enumerate(compared):
            self.compared[at] = column

    def __dealloc__(self):
        PyMem_Free(self.compared)


cdef class Table:
    """The plain rules of one relation; see `scan.compile_plain`."""

    cdef Py_ssize_t width
    cdef bytes identity
    cdef list rules
    cdef object counts
    cdef tuple names
    cdef Py_ssize_t taken[3]

    def __cinit__(self, name, identity, inserts, updates, deletes, counts):
        self.names = tuple((name, op) for op in _OPS)
        self.counts = counts
        self.identity = bytes(identity)
        self.width = len(self.identity)
        if self.width > MOST_COLUMNS:
            raise ValueError("a relation of more columns than PostgreSQL allows")
        self.rules = [
            None if rules is None else [_Rule(*rule) for rule in rules] for rules in (inserts, updates, deletes)
        ]

    cdef bint count(self) except -1:
        """Bring what was taken to the counts."""
        cdef int op
        for op in range(3):
            if self.taken[op]:
                name = self.names[op]
                self.counts[name] = self.counts.get(name, 0) + self.taken[op]
                self.taken[op] = 0
        return True


cdef const uint8_t* _row(const uint8_t* at, const uint8_t* end, Value* row, Py_ssize_t width) noexcept nogil:
    """Read a row of this width; NULL if it is not one."""
    cdef Py_ssize_t column
    cdef uint32_t size
    if end - at < 2 or u16(at) != width:
        return NULL
    at += 2
    for column in range(width):
        if at >= end:
            return NULL
        if at[0] == c't':
            if end - at < 5:
                return NULL
            size = u32(at + 1)
            at += 5
            if size > end - at:
                return NULL
            row[column].kind = TEXT
            row[column].at = at
            row[column].size = size
            at += size
        else:
            if at[0] == c'n':
                row[column].kind = NULL_VALUE
            elif at[0] == c'u':
                row[column].kind = NOT_SENT
            else:
                return NULL
            row[column].size = 0
            at += 1
    return at


cdef inline bint _differ(Value* one, Value* other) noexcept nogil:
    return one.kind != other.kind or one.size != other.size or (
        one.size and memcmp(one.at, other.at, one.size) != 0
    )


cdef bint _known_to_differ(Table table, Py_ssize_t column, uint8_t old_kind, bint* known) except -1:
    """Whether a column of an UPDATE has changed, as far as the old row tells (``known``)."""
    if old_kind == c'O' or (old_kind and table.identity[column]):
        known[0] = _old[column].kind != NOT_SENT
        return _differ(&_old[column], &_new[column])
    # Without an old tuple the identity's columns are as they were.
    known[0] = table.identity[column]
    return not known[0]


cdef bint _fires(Table table, _Rule rule, uint8_t old_kind) except -1:
    """As plan._fires."""
    cdef Py_ssize_t at
    cdef bint known = False
    cdef _Firing firing
    for at in range(rule.count):
        if _new[rule.compared[at]].kind != NOT_SENT and _known_to_differ(table, rule.compared[at], old_kind, &known):
            return True
    for firing in rule.firings:
        for at in range(firing.count):
            if (
                _new[firing.columns[at]].kind != NOT_SENT
                and _known_to_differ(table, firing.columns[at], old_kind, &known)
                and (known or firing.old == IGNORED)
            ):
                return True
    return False


cdef bint _match(Table table, Op op, const uint8_t* at, const uint8_t* end, list found) except -1:
    """Put what a row makes stale into ``found``: firing, key, firing, key …; False if it is not plain.

    ``at`` is behind the relation's oid. What was put before a False counts for nothing.
    """
    cdef list rules = table.rules[op]
    cdef uint8_t old_kind = 0
    cdef _Rule rule
    cdef _Firing firing
    if rules is None or at >= end:
        return False
    if op == INSERT:
        if at[0] != c'N':
            return False
    elif op == DELETE:
        if at[0] != c'K' and at[0] != c'O':
            return False
    elif at[0] == c'K' or at[0] == c'O':
        old_kind = at[0]
        at = _row(at + 1, end, _old, table.width)
        if at is NULL or at >= end or at[0] != c'N':
            return False
    elif at[0] != c'N':
        return False
    if _row(at + 1, end, _new, table.width) != end:
        return False
    for rule in rules:
        if op == UPDATE and rule.count and not _fires(table, rule, old_kind):
            continue
        for firing in rule.firings:
            # Of a DELETE the old row is the only one, and stands where the new one does else.
            if op == DELETE and firing.old != GIVEN:
                continue
            if not firing.sent(_new):
                return False
            found.append(firing)
            found.append(firing.key(_new))
            if op == UPDATE and old_kind and firing.old != IGNORED:
                if firing.old == KEPT or not firing.sent(_old):
                    return False
                found.append(firing)
                found.append(firing.key(_old))
    return True


cdef inline const uint8_t* _payload(const uint8_t* at, const uint8_t* end, const uint8_t** behind) noexcept nogil:
    """Where the pgoutput message of a CopyData message begins, and where it ends; NULL if it holds none."""
    if end - at < COPY + XLOG + 1 or at[0] != c'd' or at[COPY] != c'w':
        return NULL
    behind[0] = at + 1 + u32(at + 1)
    return at + COPY + XLOG if behind[0] <= end and behind[0] > at + COPY + XLOG else NULL


cdef inline int _op(uint8_t tag) noexcept nogil:
    return INSERT if tag == c'I' else UPDATE if tag == c'U' else DELETE if tag == c'D' else -1


cdef class _Event:
    """One event to be, while its transaction is read."""

    cdef _Firing firing
    cdef object op
    cdef int ops
    cdef list keys


cdef bint _collect(list found, Op op, list events, Py_ssize_t most) except -1:
    """Add what a row makes stale to the events of its transaction; False if they would be more than ``most`` allows.

    With ``most`` at 0, keys may repeat, and nothing is refused.
    """
    cdef Py_ssize_t at
    cdef _Firing firing
    cdef _Event event
    for at in range(0, len(found), 2):
        key = found[at + 1]
        if key is None:
            continue
        firing = found[at]
        for event in events:
            if event.firing.target is firing.target:
                break
        else:
            if most and len(events) >= MOST_EVENTS:
                return False
            event = _Event.__new__(_Event)
            event.firing = firing
            event.ops = 1 << op
            event.op = _OPS[op]
            event.keys = [key]
            events.append(event)
            continue
        if not event.ops & (1 << op):
            event.ops |= 1 << op
            event.op = event.op + "," + _OPS[op]
        if most:
            if key in event.keys:
                continue
            if len(event.keys) >= most:
                return False
        event.keys.append(key)
    return True


def whole(bytes data not None):
    """See `postgres.stream.whole`."""
    cdef const uint8_t* start = <const uint8_t*>PyBytes_AS_STRING(data)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data), pos = 0
    cdef int64_t following
    while size - pos >= COPY and start[pos] == c'd':
        following = pos + 1 + <int64_t>u32(start + pos + 1)
        if following > size or following < pos + COPY:
            break
        pos = following
    return pos


def transactions(bytes data not None, Py_ssize_t pos, dict plans not None, type event_type not None, Py_ssize_t limit):
    """See `scan.transactions`."""
    cdef const uint8_t* start = <const uint8_t*>PyBytes_AS_STRING(data)
    cdef const uint8_t* end = start + PyBytes_GET_SIZE(data)
    cdef const uint8_t* at = start + pos
    cdef const uint8_t* message
    cdef const uint8_t* behind = NULL
    cdef const uint8_t* begin
    cdef int op
    cdef Py_ssize_t rows, row, count = 0, keys = 0
    cdef uint32_t oid, known_oid = 0
    cdef bint plain
    cdef Table table = None
    cdef int ops[MOST_ROWS]
    cdef list all_events = [], xids = [], events = [], found = [], tables = []
    cdef set touched = set()
    cdef _Event event
    cdef uint64_t end_lsn = 0
    while keys < limit:
        begin = _payload(at, end, &behind)
        if begin is NULL or begin[0] != c'B' or behind - begin != BEGIN:
            break
        message = _payload(behind, end, &behind)
        rows = 0
        plain = True
        if events:
            events = []
        if tables:
            tables = []
        while message is not NULL:
            op = _op(message[0])
            if op < 0:
                break
            if behind - message < 5:
                plain = False
                break
            oid = u32(message + 1)
            if oid != known_oid or known_oid == 0:
                if oid not in plans:
                    plain = False
                    break
                plan = plans[oid]
                table = None
                if plan is not None:
                    table = plan.table
                    if table is None:
                        plain = False
                        break
                known_oid = oid
            if table is not None:
                if rows == MOST_ROWS:
                    plain = False
                    break
                tables.append(table)
                ops[rows] = op
                rows += 1
                if found:
                    found = []
                if not _match(table, <Op>op, message + 5, behind, found) or not _collect(
                    found, <Op>op, events, MOST_KEYS
                ):
                    plain = False
                    break
            message = _payload(behind, end, &behind)
        # Only a commit makes a transaction: one that ends in the next buffer is read again then.
        if not plain or message is NULL or message[0] != c'C' or behind - message != COMMIT or message[1] != 0:
            break
        at = behind
        count += 1
        end_lsn = u64(message + 10)
        for row in range(rows):
            (<Table>tables[row]).taken[ops[row]] += 1
            touched.add(tables[row])
        if events:
            lsn = u64(begin + 1)
            committed_at = <int64_t>u64(begin + 9)
            xid = u32(begin + 17)
            xids.append(xid)
            for event in events:
                keys += len(event.keys)
                fields = (event.firing.target, event.firing.action, event.op, event.keys, "change", lsn, committed_at, xid)
                all_events.append(tuple.__new__(event_type, fields))
    for table in touched:
        table.count()
    return at - start, count, end_lsn, all_events, xids


def rows(bytes data not None, Py_ssize_t pos, dict plans not None, dict own_plans not None, bint in_stream, Py_ssize_t limit):
    """See `scan.rows`."""
    cdef const uint8_t* start = <const uint8_t*>PyBytes_AS_STRING(data)
    cdef const uint8_t* end = start + PyBytes_GET_SIZE(data)
    cdef const uint8_t* at = start + pos
    cdef const uint8_t* message
    cdef const uint8_t* behind = NULL
    cdef int op
    cdef Py_ssize_t taken = 0, keys = 0
    cdef uint32_t oid, known_oid = 0, xid = 0, own_xid
    cdef Py_ssize_t head = 9 if in_stream else 5
    cdef Table table = None
    cdef list events = [], found = []
    cdef set touched = set()
    cdef _Event event
    while keys < limit:
        message = _payload(at, end, &behind)
        if message is NULL:
            break
        op = _op(message[0])
        if op < 0 or behind - message < head:
            break
        if in_stream:
            own_xid = u32(message + 1)
            if taken and own_xid != xid:
                break
            xid = own_xid
        oid = u32(message + head - 4)
        if oid != known_oid or known_oid == 0:
            if oid in own_plans:
                plan = own_plans[oid]
            elif oid in plans:
                plan = plans[oid]
            else:
                break
            table = None
            if plan is not None:
                table = plan.table
                if table is None:
                    break
            known_oid = oid
        if table is not None:
            if found:
                found = []
            if not _match(table, <Op>op, message + head, behind, found):
                break
            _collect(found, <Op>op, events, 0)
            keys += len(found) // 2
            table.taken[op] += 1
            touched.add(table)
        taken += 1
        at = behind
    for table in touched:
        table.count()
    return at - start, taken, (xid if in_stream and taken else None), [
        (event.firing.target, event.op, event.keys) for event in events
    ]
