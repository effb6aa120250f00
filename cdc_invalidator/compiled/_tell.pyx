# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Bust events of a flush rendered in one pass, and what they add to the counters. See `events`.

`Events` does the same in Python, to the byte: it is the reference, and does the rest.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    # Of a line without its keys and its beginning: names, numbers, a time. And of each key: a hash or a version.
    A_LINE = 400
    A_KEY = 24
    MOST_BOUNDS = 63


cdef class _Text:
    """Bytes that grow."""

    cdef char* start
    cdef char* at
    cdef char* end

    def __cinit__(self):
        self.start = self.at = self.end = NULL

    def __dealloc__(self):
        PyMem_Free(self.start)

    cdef bint room(self, Py_ssize_t size) except -1:
        """Make sure that so many bytes can be put."""
        cdef Py_ssize_t used = self.at - self.start, whole
        cdef char* grown
        if self.end - self.at < size:
            whole = 2 * (used + size)
            grown = <char*>PyMem_Realloc(self.start, whole)
            if grown is NULL:
                raise MemoryError
            self.start, self.at, self.end = grown, grown + used, grown + whole
        return True

    # These four are `noexcept` because they write to memory alone and have nothing to raise; `room` came before them.

    cdef inline void put(self, const char* text, Py_ssize_t size) noexcept nogil:
        memcpy(self.at, text, size)
        self.at += size

    cdef bint text(self, str text) except -1:
        """Put a text that needs no escapes: names of ours."""
        cdef Py_ssize_t size
        cdef const char* utf8 = PyUnicode_AsUTF8AndSize(text, &size)
        self.room(size + A_LINE)
        self.put(utf8, size)
        return True

    cdef inline void number(self, int64_t value) noexcept nogil:
        cdef char digits[20]
        cdef int count = 0
        cdef uint64_t rest
        if value < 0:
            self.at[0] = c'-'
            self.at += 1
        rest = <uint64_t>(-value) if value < 0 else <uint64_t>value
        while True:
            digits[count] = c'0' + <char>(rest % 10)
            count += 1
            rest //= 10
            if not rest:
                break
        while count:
            count -= 1
            self.at[0] = digits[count]
            self.at += 1

    cdef inline void padded(self, int64_t value, int width) noexcept nogil:
        """Put just so many digits."""
        cdef int place
        for place in range(width - 1, -1, -1):
            self.at[place] = c'0' + <char>(value % 10)
            value //= 10
        self.at += width

    cdef inline void hexadecimal(self, uint64_t value) noexcept nogil:
        cdef int shift = 60
        while shift and not (value >> shift):
            shift -= 4
        while shift >= 0:
            self.at[0] = b"0123456789ABCDEF"[(value >> shift) & 15]
            self.at += 1
            shift -= 4


cdef class Total:
    """What a flush adds to the counters of one target: see events._Total. Lags are counted by bucket."""

    cdef readonly object target
    cdef readonly object action
    cdef readonly int64_t lines, keys, existed, lag_us
    cdef int64_t counts[MOST_BOUNDS + 1]
    cdef bytes start
    cdef int bounds

    @property
    def lags(self):
        """How many lags fall into each bucket; the last one has no bound."""
        return [self.counts[at] for at in range(self.bounds + 1)]


cdef class Teller:
    """Renders flushes.

    Args:
        keyed: the hash of keys, to be copied; None where keys are not shown.
        bounds: of the lags' buckets, in seconds.
        begin: gives what all lines of a target begin with, of what the target shows.
        second: gives a second since 1970 as text.
        epoch_us: 2000 in µs since 1970.
    """

    cdef object keyed, begin, second
    cdef int64_t bounds_us[MOST_BOUNDS]
    cdef int count
    cdef int64_t epoch_us
    cdef int64_t known_second
    cdef bytes known_text

    def __cinit__(self, keyed, bounds, begin, second, epoch_us):
        self.keyed = keyed
        self.begin = begin
        self.second = second
        self.epoch_us = epoch_us
        self.count = len(bounds)
        if self.count > MOST_BOUNDS:
            raise ValueError("too many buckets")
        for at, bound in enumerate(bounds):
            self.bounds_us[at] = round(bound * 1_000_000)

    def busted(self, list events not None, list existed not None, dict versions not None, uint64_t replay_until,
               int64_t now_us, int64_t missing):
        """Render lines; see `events.Events.busted`.

        Args:
            missing: what ``versions`` says of a counter that was not there.

        Returns:
            The text, and the totals.
        """
        cdef _Text text = _Text.__new__(_Text)
        cdef list totals = []
        cdef Total total
        cdef Py_ssize_t deletes = 0, count, at
        cdef int64_t found, version, committed_us, second, us, lag_us, thousandths
        cdef uint64_t lsn
        cdef int bucket
        for target, action, op, keys, reason, commit_lsn, committed_at, xid in events:
            for total in totals:
                if total.target is target and total.action is action:
                    break
            else:
                total = Total.__new__(Total)
                total.target = target
                total.action = action
                total.bounds = self.count
                total.start = self.begin(target.shown[action])
                totals.append(total)
            count = len(<list?>keys)
            text.room(A_LINE + A_KEY * 2 * count + PyBytes_GET_SIZE(total.start))
            text.put(PyBytes_AS_STRING(total.start), PyBytes_GET_SIZE(total.start))
            if self.keyed is not None:
                text.put(b'"key_hashes":[', 14)
                for at in range(count):
                    hashed = self.keyed.copy()
                    hashed.update((<list>keys)[at])
                    text.put(b',"' if at else b'"', 2 if at else 1)
                    digits = hashed.hexdigest()
                    text.put(PyUnicode_AsUTF8AndSize(digits, NULL), 16)
                    text.put(b'"', 1)
                text.put(b'],', 2)
            if action == "delete":
                # There is one for each; if not, it must not be read from behind the end.
                if deletes >= len(existed):
                    raise IndexError
                found = existed[deletes]
                deletes += 1
            else:
                found = count
                text.put(b'"versions":[', 12)
                for at in range(count):
                    version = versions[(<list>keys)[at]]
                    found -= version == missing
                    if at:
                        text.put(b',', 1)
                    text.number(version)
                text.put(b'],', 2)
            text.put(b'"op":"', 6)
            text.text(op)
            text.put(b'","keys":', 9)
            text.number(count)
            lsn = commit_lsn
            text.put(b',"lsn":"', 8)
            text.hexadecimal(lsn >> 32)
            text.put(b'/', 1)
            text.hexadecimal(lsn & 0xFFFFFFFF)
            text.put(b'","xid":', 8)
            text.number(xid)
            text.put(b',"existed":', 11)
            text.number(found)
            text.put(b',"reason":"', 11)
            if lsn < replay_until and reason == "change":
                text.put(b'replay', 6)
            else:
                text.text(reason)
            text.put(b'"', 1)
            total.lines += 1
            total.keys += count
            total.existed += found
            if committed_at is not None:
                committed_us = <int64_t>committed_at + self.epoch_us
                lag_us = max(0, now_us - committed_us)
                bucket = 0
                while bucket < self.count and self.bounds_us[bucket] < lag_us:
                    bucket += 1
                total.counts[bucket] += 1
                total.lag_us += lag_us
                second, us = committed_us // 1_000_000, committed_us % 1_000_000
                if us < 0:
                    # Before 1970: C rounds towards zero.
                    second, us = second - 1, us + 1_000_000
                if self.known_text is None or second != self.known_second:
                    self.known_second = second
                    self.known_text = self.second(self.known_second).encode()
                text.put(b',"committed_at":"', 17)
                text.room(A_LINE + PyBytes_GET_SIZE(self.known_text))
                text.put(PyBytes_AS_STRING(self.known_text), PyBytes_GET_SIZE(self.known_text))
                text.put(b'.', 1)
                text.padded(us, 6)
                text.put(b'Z","lag_ms":', 12)
                text.number(lag_us // 1000)
                # The shortest form of the same number, as everywhere in JSON: 12.0, 12.5, 12.345.
                text.put(b'.', 1)
                thousandths = lag_us % 1000
                if thousandths % 10:
                    text.padded(thousandths, 3)
                elif thousandths % 100:
                    text.padded(thousandths // 10, 2)
                else:
                    text.padded(thousandths // 100, 1)
            text.put(b'}\n', 2)
        if text.start is NULL:
            return b"", totals
        return PyBytes_FromStringAndSize(text.start, text.at - text.start), totals
