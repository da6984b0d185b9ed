"""The optional disk buffer: batches that wait on this machine for a database that is away.

What goes in is decided in `diversion`, what comes out is stored by `drainer`.

A batch goes in whole and comes out whole: its key and ledger entry, so that whoever stores it later does so under the
same key, and its messages as they were received, which are decoded only when they are drained. First in, first out.

Invariants: what `append` answered True for is on the disk and survives kill -9 and power loss; what it answered False
for is not there and never will be; a batch that is damaged is set aside with its bytes, counted and logged, and stands
in nobody's way; one process at a time uses a directory.

**Format.** `spool.sqlite3`, SQLite in WAL mode with synchronous=FULL: one fsync a batch, and a torn write at the end of
the log is a batch that was never acknowledged. One row of `batches` a batch:

    sequence   place in the line; goes on while there are batches, starts at 1 again with an empty file
    count      number of messages
    entry      the ledger entry: `_ENTRY`, then pairs of 64-bit integers (pruned keys), then the fingerprints
    body       the messages, one after the other: `_MESSAGE`, topic, payload, properties (JSON), fingerprint
    checksum   CRC-32 of count, entry and body, for SQLite has none for its pages

Integers are little-endian. `damaged` holds such rows as they were found. `spool` is one row: id and client id.

**Size.** The cap is for `bytes`, the sum of entries and bodies. Pages of removed batches are used again, and the file
shrinks once it is empty; SQLite refuses to let it grow beyond 1.25 times the cap plus 1 MiB. The log beside it has
4 MiB and, after a batch that is larger, as much as that one until the next. 16 MiB are left free on the disk, so that
a disk that the spool itself has filled can always be drained.

Threads: any may call any method. One lock guards the connection and the figures; the figures may be read without it.
While the spool is open no other program can read the file: that spares the shared memory file, and what it does on a
full disk. A process that forks must open its spool afterwards.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import structlog

from mqtt_bridge.complaints import Complaint
from mqtt_bridge.errors import BridgeError
from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.model import Message

log = structlog.get_logger(__name__)

FILE_NAME = "spool.sqlite3"
VERSION = 1
"""Of the format. A file of a newer one is refused, an older one will be read for ever."""
RESERVE_BYTES = 16 << 20
"""Left free on the disk when the file grows: for the log, for moving it into the file, and for batches that find room
in the file's free pages. It is what makes a full disk drainable."""
SHRINK_BYTES = 16 << 20
"""An emptied file is given back to the disk when it is larger than this."""

_APPLICATION_ID = 0x4D51_4252  # "MQBR": tells our file from any other of SQLite
_PAGE_BYTES = 4096
_LOG_BYTES = 1000 * _PAGE_BYTES
_BEFORE_ALL = -(1 << 63)
_LARGEST_BYTES = 999_000_000  # SQLite takes rows of up to 10**9 bytes


class SpoolError(BridgeError):
    """The spool cannot be used. The message says what is wrong, where, and what to do."""


class SpoolInUse(SpoolError):
    """Another process has the directory: once that has ended, it can be used."""


class Spooled(NamedTuple):
    """A batch in the spool."""

    sequence: int
    entry: Entry
    messages: list[Message]


class NoSpool:
    """What stands in for a spool where there is none: it holds nothing and takes nothing."""

    id = ""
    messages = damaged = bytes = 0
    full = False

    def open(self) -> None:
        """Nothing to open."""

    def close(self) -> None:
        """Nothing to close."""

    def append(self, _entry: Entry, _messages: Sequence[Message]) -> bool:
        """No room."""
        return False

    def first(self) -> Spooled | None:
        """None."""
        return None

    def oldest(self) -> Iterator[Spooled]:
        """None."""
        return iter(())

    def remove(self, *_sequences: int) -> None:
        """Nothing to remove."""

    def entries(self) -> Iterator[Entry]:
        """None."""
        return iter(())


class Spool:
    """The disk buffer of one client id, in a directory of its own."""

    def __init__(self, directory: Path, *, client_id: str, max_bytes: int) -> None:
        """`max_bytes` is the cap for `bytes`. Nothing is touched before `open`."""
        self._directory = directory
        self._path = directory / FILE_NAME
        self._client_id = client_id
        self._max_bytes = max_bytes
        self._complaint = Complaint()
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._directory_fd: int | None = None  # open while the directory is ours: it carries the file lock
        self._connection: sqlite3.Connection | None = None
        self._next = 1  # sequence of the next batch
        self.id = ""
        """Names this file among all spools; made with it."""
        self.messages = 0
        """Messages that wait to be drained."""
        self.damaged = 0
        """Messages in batches that were set aside, also by earlier processes."""
        self.bytes = 0
        """What the batches take, those set aside included."""
        self.full = False
        """Whether the last `append` found no room, and nothing was removed since."""

    # -- open and close

    def open(self) -> None:
        """Take the directory and make or check the file; what a crash left damaged is set aside. Idempotent.

        Reads the whole content once (about a second a gigabyte from a fast disk). Raises SpoolError.
        """
        with self._lock:
            if self._connection is not None:
                return
            try:
                self._directory_fd = _take(self._directory)
                with self._explaining("cannot be opened"):
                    self._connection = self._connect()
                    self._identify(self._connection)
                    self._take_stock(self._connection)
            except BaseException:
                self._release()
                raise
        if self.messages:
            log.info("the spool holds messages of an earlier process", messages=self.messages, bytes=self.bytes)

    def close(self) -> None:
        """Leave the directory to others. Idempotent, safe when never opened."""
        with self._lock:
            self._release()

    def _release(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._directory_fd is not None:
            os.close(self._directory_fd)
            self._directory_fd = None

    def _connect(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))  # payloads are nobody else's business
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        return database

    def _identify(self, database: sqlite3.Connection) -> None:
        """Make sure that the file is this client's spool, in a format that this version knows."""
        ours = _pragma(database, "application_id") == _APPLICATION_ID
        if not ours and database.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
            raise SpoolError(f"{self._path} is not a spool. Set BRIDGE_SPOOL_DIR to a directory of its own.")
        version = _pragma(database, "user_version")
        if version > VERSION:
            raise SpoolError(
                f"the spool {self._path} was written by a newer version of the bridge (format {version}, this one"
                f" knows {VERSION}). Run that version until the spool is empty."
            )
        self._configure(database)
        if not ours:
            self._create(database)
        _check_structure(database)
        self.id, client_id = database.execute("SELECT id, client_id FROM spool").fetchone()
        if client_id != self._client_id:
            raise SpoolError(
                f"the spool {self._path} belongs to client id {client_id!r}, not {self._client_id!r}."
                " Correct MQTT_CLIENT_ID, or set BRIDGE_SPOOL_DIR to another directory."
            )

    def _configure(self, database: sqlite3.Connection) -> None:
        pages = (self._max_bytes + self._max_bytes // 4 + (1 << 20)) // _PAGE_BYTES
        for setting in (
            f"page_size = {_PAGE_BYTES}",
            "auto_vacuum = NONE",  # free pages are used again; see `_shrink`
            "journal_mode = WAL",
            "synchronous = FULL",
            "secure_delete = OFF",  # on by default on Debian: a removal would write as much as it removes
            "temp_store = MEMORY",
            f"wal_autocheckpoint = {_LOG_BYTES // _PAGE_BYTES}",
            f"journal_size_limit = {_LOG_BYTES}",
            f"max_page_count = {pages}",
        ):
            database.execute(f"PRAGMA {setting}")

    def _create(self, database: sqlite3.Connection) -> None:
        with _transaction(database):
            for table in _TABLES:
                database.execute(table)
            database.execute(f"PRAGMA user_version = {VERSION}")
            database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            database.execute("INSERT INTO spool VALUES (?, ?)", (uuid4().hex, self._client_id))
        assert self._directory_fd is not None
        os.fsync(self._directory_fd)  # the file's name must survive too

    def _take_stock(self, database: sqlite3.Connection) -> None:
        """Count what is there, and set aside what is damaged."""
        self.messages, self.full = 0, False
        self.damaged, self.bytes, last = database.execute(_DAMAGED_SO_FAR).fetchone()
        sequence = _BEFORE_ALL
        while row := _row_after(database, sequence):
            sequence = row.sequence
            self.messages += row.message_count
            self.bytes += row.size
            if not row.intact:
                self._set_aside(database, row, _MISMATCH)
        self._next = max(last, sequence, 0) + 1

    # -- in

    def append(self, entry: Entry, messages: Sequence[Message]) -> bool:
        """Put a batch at the end of the line. True once it is durable; False when there is no room for it.

        False means that it is certainly not in the spool. SpoolError means that nobody can tell (the disk failed while
        it was told to make the batch durable): then the batch must not be stored by this process either, which has to
        end; the next one finds out.
        """
        head, body = _encode_entry(entry), _encode_messages(messages)
        row = _Row(0, len(messages), head, body, _checksum(len(messages), head, body))
        with self._lock, self._explaining("has failed"):
            # Decided here: whether there is room, and the batch's place in the line.
            database = self._database()
            try:
                self._check_room(database, row.size)
                _insert(database, row._replace(sequence=self._next))
            except _NoRoom as reason:
                self._refuse(str(reason))
                return False
            self._accept(row)
        return True

    def _check_room(self, database: sqlite3.Connection, size: int) -> None:
        if self.bytes + size > self._max_bytes or size > _LARGEST_BYTES:
            raise _NoRoom("its cap is reached (BRIDGE_SPOOL_MAX_MB)")
        assert self._directory_fd is not None
        disk = os.fstatvfs(self._directory_fd)
        # Written into the log, then from there into the file: into free pages of it, or it grows.
        fits = size + _PAGE_BYTES < _pragma(database, "freelist_count") * _PAGE_BYTES
        needed = size + (_LOG_BYTES if fits else size + RESERVE_BYTES)
        if disk.f_bavail * disk.f_frsize < needed:
            raise _NoRoom("its disk is full")

    def _accept(self, row: _Row) -> None:
        self._next += 1
        self.messages += row.message_count
        self.bytes += row.size
        self.full = False
        if self._complaint.clear():
            log.info("the spool takes batches again", path=str(self._path))

    def _refuse(self, reason: str) -> None:
        self.full = True
        if self._complaint.is_news(reason):
            log.warning(
                f"the spool takes nothing more: {reason}",
                path=str(self._path),
                messages=self.messages,
                bytes=self.bytes,
                consequence="messages are held, unacknowledged; the broker keeps what comes",
            )

    # -- out

    def first(self) -> Spooled | None:
        """The oldest batch, which stays where it is; None when there is none. Raises SpoolError."""
        return next(self.oldest(), None)

    def oldest(self) -> Iterator[Spooled]:
        """The batches, oldest first; each is read when it is asked for, and stays where it is. Raises SpoolError."""
        sequence = _BEFORE_ALL
        while spooled := self._after(sequence):
            sequence = spooled.sequence
            yield spooled

    def _after(self, sequence: int) -> Spooled | None:
        with self._lock, self._explaining("cannot be read"):
            # Decided here: a batch that cannot be read is passed over for good.
            database = self._database()
            while row := _row_after(database, sequence):
                try:
                    return _decode(row)
                except _Damaged as error:
                    self._set_aside(database, row, str(error))
            if sequence == _BEFORE_ALL:
                self.messages = 0  # whatever damage has made of it: nobody shall wait for what is not there
        return None

    def remove(self, *sequences: int) -> None:
        """Take batches out, durably and all at once; one that is not there is no error.

        Raises SpoolError when the disk does not let it: they may still be there, and be drained once more.
        """
        with self._lock, self._explaining("cannot remove a batch"):
            database = self._database()
            found = [database.execute(_COUNT_AND_SIZE, (sequence,)).fetchone() for sequence in sequences]
            _delete(database, sequences)
            self.messages -= sum(row[0] for row in found if row)
            self.bytes -= sum(row[1] for row in found if row)
            self.full = False
            if not self.messages:
                self._shrink(database)

    def _shrink(self, database: sqlite3.Connection) -> None:
        """Give an emptied file back to the disk. While it is in use its free pages are worth more than their room."""
        if _pragma(database, "freelist_count") * _PAGE_BYTES <= SHRINK_BYTES:
            return
        try:
            database.execute("VACUUM")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.OperationalError as error:  # a large file is no harm: it is used again
            log.debug("the spool's file could not be made smaller", error=str(error))

    def entries(self) -> Iterator[Entry]:
        """The ledger entries of the batches in the spool, in order: what is known is the ledger and these."""
        sequence = _BEFORE_ALL
        while found := self._entry_after(sequence):
            sequence, entry = found
            yield entry

    def _entry_after(self, sequence: int) -> tuple[int, Entry] | None:
        with self._lock, self._explaining("cannot be read"):
            found = self._database().execute(_ENTRY_AFTER, (sequence,)).fetchone()
        return (found[0], _decode_entry(found[1])) if found else None

    # -- damage

    def _set_aside(self, database: sqlite3.Connection, row: _Row, reason: str) -> None:
        with _transaction(database):
            # Deleted first: on a full disk its own pages make room for it.
            database.execute(_DELETE, (row.sequence,))
            found_us = time.time_ns() // 1000
            database.execute("INSERT INTO damaged VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, found_us, reason))
        self.messages -= row.message_count
        self.damaged += row.message_count
        log.error(
            f"a batch in the spool is damaged: {reason}",
            path=str(self._path),
            sequence=row.sequence,
            messages=row.message_count,
            bytes=row.size,
            consequence="its messages are not stored; their bytes are kept in the table damaged of this file",
        )

    # -- the connection

    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            raise SpoolError(f"the spool {self._path} is not open.")
        return self._connection

    @contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        """Turns errors of SQLite and of the file system into SpoolError."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter: SQLite quotes what it finds in the file
            raise SpoolError(f"the spool {self._path} {what}: {error}. {_remedy(error)}") from error
        except OSError as error:
            remedy = "Let the bridge's user read and write it."
            raise SpoolError(f"the spool {self._path} {what}: {error.strerror}. {remedy}") from error


def _take(directory: Path) -> int:
    """A descriptor of the directory, with the lock that keeps others out until it is closed.

    The directory is made where its parent is there: a volume that was not mounted shows by the spool's id.
    """
    try:
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        remedy = "Make its parent (or mount the volume) and let the bridge write there, or correct BRIDGE_SPOOL_DIR."
        raise SpoolError(f"the spool's directory {directory} cannot be used: {error.strerror}. {remedy}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            text = "is in use by another process. Give each bridge a BRIDGE_SPOOL_DIR of its own."
            raise SpoolInUse(f"the spool's directory {directory} {text}") from error
        text = f"cannot be locked: {error.strerror}. Set BRIDGE_SPOOL_DIR to a directory on a local disk."
        raise SpoolError(f"the spool's directory {directory} {text}") from error
    return descriptor


_REMEDIES = {
    sqlite3.SQLITE_FULL: "Free space on its disk.",
    sqlite3.SQLITE_BUSY: "Close the program that has the file open.",
    sqlite3.SQLITE_READONLY: "Let the bridge's user write the file and its directory.",
    sqlite3.SQLITE_CANTOPEN: "Let the bridge's user write the file and its directory.",
    sqlite3.SQLITE_IOERR: "Check the disk and the system's log.",
    sqlite3.SQLITE_NOTADB: "Set BRIDGE_SPOOL_DIR to a directory of its own.",
    sqlite3.SQLITE_CORRUPT: "Keep a copy of the directory (SQLite's .recover reads most of it), and set"
    " BRIDGE_SPOOL_DIR to an empty one.",
}


def _remedy(error: Exception) -> str:
    return _REMEDIES.get(_code(error) & 0xFF, _REMEDIES[sqlite3.SQLITE_IOERR])


def _code(error: Exception) -> int:
    """SQLite's extended error code; 0 for errors that Python's module raises by itself."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT if isinstance(error, UnicodeError) else 0)


# -- statements

_TABLES = (
    "CREATE TABLE spool (id TEXT NOT NULL, client_id TEXT NOT NULL)",
    "CREATE TABLE batches (sequence INTEGER PRIMARY KEY, count INTEGER NOT NULL, entry BLOB NOT NULL,"
    " body BLOB NOT NULL, checksum INTEGER NOT NULL)",
    "CREATE TABLE damaged (sequence INTEGER PRIMARY KEY, count INTEGER NOT NULL, entry BLOB NOT NULL,"
    " body BLOB NOT NULL, checksum INTEGER NOT NULL, found_us INTEGER NOT NULL, reason TEXT NOT NULL)",
)
# A damaged row may have values of any type: the casts give them back the one that they had.
_ROW_AFTER = """
SELECT sequence, coalesce(CAST(count AS INTEGER), 0), coalesce(CAST(entry AS BLOB), x''),
  coalesce(CAST(body AS BLOB), x''), coalesce(CAST(checksum AS INTEGER), 0)
FROM batches WHERE sequence > ? ORDER BY sequence LIMIT 1
"""
_ENTRY_AFTER = "SELECT sequence, entry FROM batches WHERE sequence > ? ORDER BY sequence LIMIT 1"
_COUNT_AND_SIZE = "SELECT count, length(entry) + length(body) FROM batches WHERE sequence = ?"
_DAMAGED_SO_FAR = """
SELECT coalesce(sum(count), 0), coalesce(sum(length(entry) + length(body)), 0), coalesce(max(sequence), 0) FROM damaged
"""
_DELETE = "DELETE FROM batches WHERE sequence = ?"


class _Row(NamedTuple):
    """One row of `batches`."""

    sequence: int
    message_count: int
    entry: bytes
    body: bytes
    checksum: int

    @property
    def size(self) -> int:
        return len(self.entry) + len(self.body)

    @property
    def intact(self) -> bool:
        return self.checksum == _checksum(self.message_count, self.entry, self.body)


class _NoRoom(Exception):
    """The batch does not fit: the message says into what."""


def _row_after(database: sqlite3.Connection, sequence: int) -> _Row | None:
    found = database.execute(_ROW_AFTER, (sequence,)).fetchone()
    return _Row(*found) if found else None


def _insert(database: sqlite3.Connection, row: _Row) -> None:
    """One statement, one transaction. `_NoRoom` when it cannot be written.

    The record that makes a transaction valid is the last one written to the log: if any write fails, it is not there.
    Only after a failed fsync nobody knows; that error is passed on.
    """
    try:
        database.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", row)
    except sqlite3.OperationalError as error:
        if _code(error) == sqlite3.SQLITE_FULL:
            raise _NoRoom("its disk is full, or its file as large as it may be (BRIDGE_SPOOL_MAX_MB)") from error
        if _code(error) == sqlite3.SQLITE_IOERR_WRITE:
            raise _NoRoom("its disk refuses to be written to (a quota, a limit of file size, read-only)") from error
        raise


def _delete(database: sqlite3.Connection, sequences: Sequence[int]) -> None:
    try:
        _delete_all(database, sequences)
    except sqlite3.OperationalError as error:
        if _code(error) not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
            raise
        # Somebody else has filled the disk. Moving the log into the file often needs no room, and makes some.
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        _delete_all(database, sequences)


def _delete_all(database: sqlite3.Connection, sequences: Sequence[int]) -> None:
    with _transaction(database):
        for sequence in sequences:
            database.execute(_DELETE, (sequence,))


def _check_structure(database: sqlite3.Connection) -> None:
    """Checksums tell of damaged content, this of damaged pages: writing to those would spread the damage."""
    (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
    tables = [sql for (sql,) in database.execute("SELECT sql FROM sqlite_master")]
    if verdict == "ok" and tables != [*_TABLES]:
        verdict = "the tables are not as they were made"
    if verdict != "ok":
        found = " ".join(verdict.removeprefix("*** in database main ***").split())
        error = sqlite3.DatabaseError(f"the file is damaged ({found})")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _pragma(database: sqlite3.Connection, name: str) -> int:
    value: int = database.execute(f"PRAGMA {name}").fetchone()[0]
    return value


# -- encoding

_ENTRY = struct.Struct("<qqqq?I")
"""Owner epoch, batch, session epoch, first position, whether the session is raised, number of pruned keys."""
_KEY = struct.Struct("<qq")
_MESSAGE = struct.Struct("<IIIBBqq")
"""Lengths of topic, payload and properties; flags; length of the fingerprint; received_us; position."""
_QOS, _RETAIN, _UNWANTED = 0b0011, 0b0100, 0b1000


_MISMATCH = "its checksum does not match"


class _Damaged(Exception):
    """A row is not what was written: the message says how that shows."""


def _checksum(count: int, entry: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(entry, count))


def _encode_entry(entry: Entry) -> bytes:
    fixed = _ENTRY.pack(*entry.key, entry.session_epoch, entry.first_position, entry.raises_session, len(entry.pruned))
    return b"".join((fixed, *(_KEY.pack(*key) for key in entry.pruned), entry.fingerprints))


def _encode_messages(messages: Sequence[Message]) -> bytes:
    parts: list[bytes] = []
    for message in messages:
        topic, payload, qos, retain, received_us, position, fingerprint, properties, unwanted = message
        extra = b"" if properties is None else json.dumps(properties, separators=(",", ":")).encode()
        flags = qos | retain * _RETAIN | unwanted * _UNWANTED
        sizes = len(topic), len(payload), len(extra)
        parts += (_MESSAGE.pack(*sizes, flags, len(fingerprint), received_us, position), topic, payload, extra)
        parts.append(fingerprint)
    return b"".join(parts)


def _decode(row: _Row) -> Spooled:
    if not row.intact:
        raise _Damaged(_MISMATCH)
    try:
        spooled = Spooled(row.sequence, _decode_entry(row.entry), list(_decode_messages(row.body)))
    except (struct.error, ValueError) as error:
        raise _Damaged(f"it cannot be decoded ({error})") from error
    if len(spooled.messages) != row.message_count:
        raise _Damaged(f"it holds {len(spooled.messages)} messages instead of {row.message_count}")
    return spooled


def _decode_entry(head: bytes) -> Entry:
    epoch, batch, session_epoch, first_position, raises_session, count = _ENTRY.unpack_from(head)
    end = _ENTRY.size + count * _KEY.size
    pruned = tuple(BatchKey(*key) for key in _KEY.iter_unpack(head[_ENTRY.size : end]))
    return Entry(BatchKey(epoch, batch), session_epoch, first_position, head[end:], pruned, raises_session)


def _decode_messages(body: bytes) -> Iterator[Message]:
    end = 0
    while end < len(body):
        topic_size, payload_size, extra_size, flags, mark_size, received_us, position = _MESSAGE.unpack_from(body, end)
        topic = end + _MESSAGE.size
        payload = topic + topic_size
        extra = payload + payload_size
        mark = extra + extra_size
        end = mark + mark_size
        yield Message(
            body[topic:payload],
            body[payload:extra],
            flags & _QOS,
            flags & _RETAIN != 0,
            received_us,
            position,
            body[mark:end],
            json.loads(body[extra:mark]) if extra_size else None,
            flags & _UNWANTED != 0,
        )
    if end != len(body):
        raise ValueError("its last message is cut off")
