"""The disk buffer: what goes in comes out, in order and whole; what is damaged or foreign is told, not believed."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import stat
import struct
import tempfile
import threading
import zlib
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from mqtt_bridge import spool as module
from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.model import Message
from mqtt_bridge.spool import FILE_NAME, SHRINK_BYTES, Spool, SpoolError

MB = 1 << 20
MOST_LOG_BYTES = 5 * MB
"""The log beside the file, after batches of a few hundred kilobytes at most."""


@pytest.fixture
def open_spool(tmp_path):
    """Opens a spool in a directory of its own, again and again if the test likes; all are closed after the test."""
    opened = []

    def open_(*, client_id="bridge", max_bytes=100 * MB, directory=tmp_path):
        spool = Spool(directory, client_id=client_id, max_bytes=max_bytes)
        opened.append(spool)
        spool.open()
        return spool

    yield open_
    for spool in opened:
        spool.close()


def batch(number, *, messages=3, payload=b"21.5"):
    """The entry and the messages of a batch: no two are alike."""
    first = number * messages + 1
    content = [
        Message(b"devices/%d/telemetry" % i, payload, 1, False, 1_700_000_000_000_000 + i, i, struct.pack("<q", i))
        for i in range(first, first + messages)
    ]
    return Entry(BatchKey(7, number), 2, first, b"".join(m.fingerprint for m in content)), content


def fill(spool, numbers, **kwargs):
    for number in numbers:
        assert spool.append(*batch(number, **kwargs))


def drain(spool):
    """The batch numbers that come out, each checked against what went in."""
    numbers = []
    while spooled := spool.first():
        number = spooled.entry.key.batch
        assert (spooled.entry, spooled.messages) == batch(
            number, messages=len(spooled.messages), payload=spooled.messages[0].payload
        )
        spool.remove(spooled.sequence)
        numbers.append(number)
    return numbers


def size_on_disk(directory):
    return sum(path.stat().st_size for path in directory.iterdir())


# -- in and out


def test_batches_come_out_in_the_order_in_which_they_went_in(open_spool):
    spool = open_spool()

    fill(spool, [5, 3, 9, 1])

    assert drain(spool) == [5, 3, 9, 1]


def test_the_first_batch_stays_until_it_is_removed(open_spool):
    spool = open_spool()
    fill(spool, [1, 2])

    once, again = spool.first(), spool.first()

    assert once == again
    assert once.messages == batch(1)[1]


def test_an_empty_spool_has_no_first_batch(open_spool):
    assert open_spool().first() is None


def test_removing_what_is_not_there_is_no_error(open_spool):
    spool = open_spool()
    fill(spool, [1, 2])
    first = spool.first()

    spool.remove(first.sequence)
    spool.remove(first.sequence)
    spool.remove(999)

    assert drain(spool) == [2]


def test_the_figures_follow_every_step(open_spool):
    spool = open_spool()
    assert (spool.messages, spool.bytes, spool.full) == (0, 0, False)

    fill(spool, [1], messages=10)
    one = spool.bytes
    fill(spool, [2], messages=10)

    assert spool.messages == 20
    assert spool.bytes == 2 * one > 10 * len(b"devices/1/telemetry21.5")

    drain(spool)

    assert (spool.messages, spool.bytes, spool.damaged) == (0, 0, 0)


int64 = st.integers(-(2**63), 2**63 - 1)
keys = st.builds(BatchKey, int64, int64)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
messages = st.builds(
    Message,
    topic=st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
    payload=st.binary(max_size=5000),
    qos=st.integers(0, 2),
    retain=st.booleans(),
    received_us=int64,
    position=int64,
    fingerprint=st.binary(max_size=8),
    properties=st.none() | st.dictionaries(st.text(), json_values, max_size=4),
    unwanted=st.booleans(),
)
entries = st.builds(
    Entry,
    key=keys,
    session_epoch=int64,
    first_position=int64,
    fingerprints=st.binary(max_size=200),
    pruned=st.lists(keys, max_size=5).map(tuple),
    raises_session=st.booleans(),
)


@pytest.fixture(scope="module")
def lasting_spool(tmp_path_factory):
    spool = Spool(tmp_path_factory.mktemp("spool"), client_id="bridge", max_bytes=100 * MB)
    spool.open()
    yield spool
    spool.close()


@given(entry=entries, content=st.lists(messages, max_size=8))
def test_whatever_goes_in_comes_out_unchanged(lasting_spool, entry, content):
    assert lasting_spool.append(entry, content)

    spooled = lasting_spool.first()
    known = list(lasting_spool.entries())
    lasting_spool.remove(spooled.sequence)

    assert (spooled.entry, spooled.messages) == (entry, content)
    assert {type(flag) for m in spooled.messages for flag in (m.retain, m.unwanted)} <= {bool}
    assert known == [entry]
    assert (lasting_spool.messages, lasting_spool.bytes) == (0, 0)


def test_topics_and_payloads_may_be_any_bytes_and_properties_any_json(open_spool):
    spool = open_spool()
    properties = {"ContentType": "größe/温度", "UserProperty": [["a", "b"], ["a", "c"]], "n": 2**70, "odd": "\ud800"}
    content = [
        Message("geräte/温度/🌡".encode(), "23 °C".encode(), 0, True, 1, properties=properties),
        Message(b"\xff\xfe\x00bad", bytes(range(256)), 1, False, 2, 3, b"12345678", {}),
        Message(b"", b"", 0, False, 0),
    ]

    assert spool.append(batch(1)[0], content)

    assert spool.first().messages == content


def test_the_entries_tell_what_is_in_the_spool_in_order(open_spool):
    spool = open_spool()
    fill(spool, [4, 2, 3])
    spool.remove(spool.first().sequence)

    assert list(spool.entries()) == [batch(2)[0], batch(3)[0]]


# -- open and close


def test_everything_is_there_after_a_restart(open_spool):
    first = open_spool()
    fill(first, [1, 2, 3])
    first.remove(first.first().sequence)
    figures = (first.id, first.messages, first.bytes)
    first.close()

    second = open_spool()
    fill(second, [4])

    assert (second.id, second.messages - 3) == figures[:2]
    assert second.bytes > figures[2] > 0
    assert drain(second) == [2, 3, 4]


def test_a_spool_is_named_once_and_unlike_any_other(open_spool, tmp_path_factory):
    one = open_spool()
    other = open_spool(directory=tmp_path_factory.mktemp("other"))
    name = one.id
    one.close()

    assert open_spool().id == name != other.id
    assert len(name) == 32


def test_opening_and_closing_twice_is_no_error(open_spool):
    spool = open_spool()
    fill(spool, [1])

    spool.open()
    spool.close()
    spool.close()
    spool.open()

    assert drain(spool) == [1]


def test_a_spool_that_was_never_opened_can_be_closed_and_says_so_when_used(tmp_path):
    spool = Spool(tmp_path, client_id="bridge", max_bytes=MB)

    spool.close()

    with pytest.raises(SpoolError, match=r"spool\.sqlite3 is not open"):
        spool.append(*batch(1))
    with pytest.raises(SpoolError, match="is not open"):
        spool.first()
    assert list(tmp_path.iterdir()) == []


def test_nobody_else_may_read_the_payloads(open_spool, tmp_path):
    fill(open_spool(), [1])

    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_batch_is_acknowledged_only_after_an_fsync(open_spool):
    spool = open_spool()

    # What SQLite's manual promises durability for: pragma synchronous, FULL in WAL mode.
    assert spool._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert spool._connection.execute("PRAGMA synchronous").fetchone() == (2,)


@pytest.mark.parametrize("left_by_the_crash", ["an empty file", "a file without tables"])
def test_a_crash_while_the_file_was_made_does_no_harm(open_spool, tmp_path, left_by_the_crash):
    (tmp_path / FILE_NAME).touch()
    if left_by_the_crash == "a file without tables":
        with closing(sqlite3.connect(tmp_path / FILE_NAME)) as database:
            database.execute("PRAGMA journal_mode = WAL")

    spool = open_spool()
    fill(spool, [1])

    assert drain(spool) == [1]


# -- what is refused at the start


def test_a_missing_directory_is_named_with_what_to_do(open_spool, tmp_path):
    with pytest.raises(
        SpoolError, match=r"missing cannot be used: No such file or directory. Make its parent .*volume"
    ):
        open_spool(directory=tmp_path / "no" / "missing")


def test_a_missing_directory_is_made_where_its_parent_is_there(open_spool, tmp_path):
    open_spool(directory=tmp_path / "made")

    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700


def test_a_file_in_place_of_the_directory_is_refused(open_spool, tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(SpoolError, match="Not a directory"):
        open_spool(directory=tmp_path / "file")


@contextmanager
def ordinary_user():
    """Who is root may write everywhere: become somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_cannot_be_written_is_refused(open_spool):
    directory = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own directories are closed to other users
    directory.chmod(0o555)
    try:
        with ordinary_user(), pytest.raises(SpoolError, match=r"cannot be opened: Permission denied. Let the bridge's"):
            open_spool(directory=directory)
    finally:
        directory.chmod(0o700)
        shutil.rmtree(directory)


def test_the_spool_of_another_client_id_is_refused(open_spool):
    open_spool(client_id="bridge-1").close()

    with pytest.raises(SpoolError, match=r"belongs to client id 'bridge-1', not 'bridge-2'.*MQTT_CLIENT_ID"):
        open_spool(client_id="bridge-2")

    assert open_spool(client_id="bridge-1").messages == 0


def test_a_directory_is_refused_while_another_spool_has_it(open_spool):
    first = open_spool()

    with pytest.raises(SpoolError, match=r"is in use by another process.*BRIDGE_SPOOL_DIR"):
        open_spool()

    fill(first, [1])
    first.close()
    assert drain(open_spool()) == [1]


def test_a_directory_that_cannot_be_locked_is_refused(open_spool, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", flock)

    with pytest.raises(SpoolError, match=r"cannot be locked: No locks available.*local disk"):
        open_spool()


def alter(directory, *statements):
    """Change the file behind the spool's back."""
    with closing(sqlite3.connect(directory / FILE_NAME)) as database:
        for statement, *values in statements:
            database.execute(statement, values)
        database.commit()


def test_a_file_of_a_newer_version_is_refused_and_left_alone(open_spool, tmp_path):
    fill(spool := open_spool(), [1])
    spool.close()
    alter(tmp_path, ["PRAGMA user_version = 2"])
    before = (tmp_path / FILE_NAME).read_bytes()

    with pytest.raises(SpoolError, match=r"newer version of the bridge \(format 2, this one knows 1\). Run that"):
        open_spool()

    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_a_database_of_another_program_is_refused_and_left_alone(open_spool, tmp_path):
    alter(tmp_path, ["CREATE TABLE mine (x)"])
    before = (tmp_path / FILE_NAME).read_bytes()

    with pytest.raises(SpoolError, match=r"spool\.sqlite3 is not a spool. Set BRIDGE_SPOOL_DIR"):
        open_spool()

    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(open_spool, tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"certainly not SQLite" * 500)

    with pytest.raises(SpoolError, match=r"cannot be opened: file is not a database. Set BRIDGE_SPOOL_DIR"):
        open_spool()

    assert (tmp_path / FILE_NAME).read_bytes() == b"certainly not SQLite" * 500


def test_a_file_whose_pages_are_destroyed_is_refused_with_how_to_rescue_it(open_spool, tmp_path):
    fill(spool := open_spool(), range(200))
    spool.close()
    with (tmp_path / FILE_NAME).open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 3 * 4096)

    with pytest.raises(SpoolError, match=r"cannot be opened: the file is damaged \(.*\)\. Keep a copy .*\.recover"):
        open_spool()


@pytest.mark.parametrize(
    ("written", "found", "message"),
    [
        # A key that is no key any more makes every batch invisible.
        (
            b"batches (sequence INTEGER PRIMARY",
            b"batches (sequence INTEOER PRIMARY",
            r"database disk image is malformed",
        ),
        (b"count INTEGER", b"coust INTEGER", r"the file is damaged \(the tables are not as they were made\)"),
        # SQLite quotes what it cannot read, also what is not UTF-8.
        (b"CREATE TABLE batches", b"CREATE\xa0TABLE batches", r"can't decode byte 0xa0"),
    ],
)
def test_a_file_whose_description_is_damaged_is_refused(open_spool, tmp_path, written, found, message):
    fill(spool := open_spool(), [1])
    spool.close()
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes().replace(written, found))

    with pytest.raises(SpoolError, match=rf"{message}.*Keep a copy of the directory"):
        open_spool()


# -- damage


def flip(path, needle):
    """One bit of what stands on the disk."""
    content = path.read_bytes()
    assert content.count(needle) >= 1
    at = content.rindex(needle)  # the first one may be on a page that SQLite has in its cache
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([content[at] ^ 1]))


def damaged_rows(directory):
    with closing(sqlite3.connect(directory / FILE_NAME)) as database:
        return database.execute("SELECT sequence, count, body, reason FROM damaged").fetchall()


def test_a_damaged_batch_is_set_aside_with_its_bytes_and_stands_in_nobodys_way(open_spool, tmp_path):
    spool = open_spool()
    fill(spool, [1])
    fill(spool, [2], payload=b"to be damaged")
    fill(spool, [3])
    spool.close()
    flip(tmp_path / FILE_NAME, b"to be damaged")

    with capture_logs() as logs:
        spool = open_spool()

    assert (spool.messages, spool.damaged) == (6, 3)
    assert [entry.key.batch for entry in spool.entries()] == [1, 3]
    assert drain(spool) == [1, 3]
    (error,) = [line for line in logs if line["log_level"] == "error"]
    assert error["event"] == "a batch in the spool is damaged: its checksum does not match"
    assert error["messages"] == 3
    spool.close()
    ((sequence, count, body, reason),) = damaged_rows(tmp_path)
    assert (sequence, count, reason) == (2, 3, "its checksum does not match")
    assert body.count(b"to be damaged") == 2


def test_what_was_set_aside_is_still_counted_after_a_restart_and_never_in_the_way_of_new_batches(open_spool, tmp_path):
    spool = open_spool()
    fill(spool, [1], payload=b"to be damaged")
    spool.close()
    flip(tmp_path / FILE_NAME, b"to be damaged")
    spool = open_spool()
    spool.close()

    spool = open_spool()
    fill(spool, [2], payload=b"damaged as well")
    spool.close()
    flip(tmp_path / FILE_NAME, b"damaged as well")
    spool = open_spool()
    fill(spool, [3])

    assert (spool.messages, spool.damaged) == (3, 6)
    assert drain(spool) == [3]
    assert spool.bytes > 0
    spool.close()
    assert [row[0] for row in damaged_rows(tmp_path)] == [1, 2]


def test_a_batch_that_is_damaged_while_the_spool_is_open_is_set_aside_too(open_spool, tmp_path):
    spool = open_spool()
    fill(spool, [1], messages=1, payload=b"to be damaged" * (8 * MB // 13))
    fill(spool, [2], messages=1, payload=b"x" * 8 * MB)  # pushes the first one out of SQLite's cache
    spool.close()
    spool.open()
    flip(tmp_path / FILE_NAME, b"to be damaged")

    assert drain(spool) == [2]
    assert (spool.messages, spool.damaged) == (0, 1)


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_a_count_that_is_damaged_while_the_spool_is_open_leaves_no_messages_behind_in_the_figures(open_spool, count):
    """Whoever waits for an empty spool would wait for ever."""
    fill(spool := open_spool(), [1])
    spool._connection.execute("UPDATE batches SET count = ?", (count,))

    assert drain(spool) == []

    assert spool.messages == 0


@pytest.mark.parametrize("sequence", [0, -5])
def test_a_batch_whose_place_is_damaged_is_found_all_the_same(open_spool, tmp_path, sequence):
    fill(spool := open_spool(), [1, 2])
    spool.close()
    alter(tmp_path, ["UPDATE batches SET sequence = ? WHERE sequence = 1", sequence])

    spool = open_spool()

    assert [entry.key.batch for entry in spool.entries()] == [1, 2]
    assert drain(spool) == [1, 2]


@pytest.mark.parametrize(
    ("change", "count", "reason"),
    [
        (lambda body: body[:-1], 3, "it cannot be decoded (its last message is cut off)"),
        (lambda body: body + b"\x00", 3, "it cannot be decoded (unpack_from requires"),
        (lambda body: body, 4, "it holds 3 messages instead of 4"),
    ],
)
def test_a_batch_that_makes_no_sense_although_its_checksum_matches_is_set_aside(
    open_spool, tmp_path, change, count, reason
):
    fill(spool := open_spool(), [1, 2])
    spool.close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as database:
        entry, body = database.execute("SELECT entry, body FROM batches WHERE sequence = 1").fetchone()
    body = change(body)
    checksum = zlib.crc32(body, zlib.crc32(entry, count))
    alter(
        tmp_path,
        ["UPDATE batches SET count = ?, body = ?, checksum = ? WHERE sequence = 1", count, body, checksum],
    )

    spool = open_spool()

    assert drain(spool) == [2]
    assert (spool.messages, spool.damaged) == (0, count)
    spool.close()
    assert damaged_rows(tmp_path)[0][3].startswith(reason)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A spool's file with a few batches, as bytes."""
    directory = tmp_path_factory.mktemp("image")
    spool = Spool(directory, client_id="bridge", max_bytes=100 * MB)
    spool.open()
    for number in range(1, 9):
        assert spool.append(*batch(number, messages=number * number))
    spool.close()
    return (directory / FILE_NAME).read_bytes()


@settings(max_examples=300)
@given(at=st.integers(0, (1 << 20) - 1), mask=st.sampled_from([1 << bit for bit in range(8)]))
def test_one_wrong_bit_anywhere_is_told_or_costs_one_batch_or_nothing(image, at, mask):
    at %= len(image)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / FILE_NAME).write_bytes(image[:at] + bytes([image[at] ^ mask]) + image[at + 1 :])
        spool = Spool(Path(directory), client_id="bridge", max_bytes=100 * MB)
        try:
            spool.open()
            numbers = drain(spool)
        except SpoolError:
            return
        finally:
            spool.close()
        lost = [row[0] for row in damaged_rows(Path(directory))]

    assert numbers == sorted(numbers)
    assert len(lost) <= 1
    assert len(numbers) + len(lost) == 8


@pytest.mark.parametrize("seed", range(8))
def test_a_torn_log_loses_only_what_was_never_acknowledged(open_spool, tmp_path, tmp_path_factory, seed):
    """Power loss: of what was not yet synced, the end of the log may be missing or rubbish."""
    spool = open_spool()
    sizes = []
    for number in range(1, 20):
        fill(spool, [number], messages=1 + number * 7 % 50)
        sizes.append((tmp_path / f"{FILE_NAME}-wal").stat().st_size)

    for cut in range(sizes[0] + seed * 1500, sizes[-1], 12_000):
        image = tmp_path_factory.mktemp("image")
        for name in (FILE_NAME, f"{FILE_NAME}-wal"):
            shutil.copy(tmp_path / name, image)
        with (image / f"{FILE_NAME}-wal").open("r+b") as log:
            log.seek(cut)
            log.write(b"\xa5" * 40 if seed % 2 else b"")
            log.truncate(cut + 40 * (seed % 2))
        survivor = open_spool(directory=image)

        acknowledged = sum(size <= cut for size in sizes)
        assert drain(survivor) == list(range(1, acknowledged + 1))
        assert survivor.damaged == 0
        survivor.close()


# -- full


def test_a_batch_beyond_the_cap_is_refused_and_leaves_nothing_behind(open_spool):
    spool = open_spool(max_bytes=10_000)
    numbers = iter(range(1, 1000))
    with capture_logs() as logs:
        accepted = 0
        while spool.append(*batch(next(numbers))):
            accepted += 1
            assert not spool.full

    assert accepted > 10
    assert spool.full
    assert spool.bytes <= 10_000
    assert spool.messages == 3 * accepted
    assert not spool.append(*batch(500))
    (warning,) = logs
    assert warning["event"] == "the spool takes nothing more: its cap is reached (BRIDGE_SPOOL_MAX_MB)"
    assert drain(spool) == list(range(1, accepted + 1))


def test_a_removal_makes_room_again(open_spool):
    spool = open_spool(max_bytes=600)
    fill(spool, [1, 2])
    assert not spool.append(*batch(3))
    assert spool.full

    with capture_logs() as logs:
        spool.remove(spool.first().sequence)
        assert not spool.full
        fill(spool, [3])

    assert [line["event"] for line in logs] == ["the spool takes batches again"]
    assert drain(spool) == [2, 3]


def test_a_cap_that_was_lowered_stops_new_batches_and_keeps_the_old_ones(open_spool):
    fill(spool := open_spool(), range(50), messages=100)
    spool.close()

    spool = open_spool(max_bytes=1000)

    assert not spool.append(*batch(50))
    assert drain(spool) == list(range(50))
    fill(spool, [51])


@pytest.mark.parametrize(
    ("cap", "messages", "payload_bytes"),
    [(MB // 8, 1, 1), (2 * MB, 1, 2050), (2 * MB, 3, 700), (2 * MB, 40, 200), (4 * MB, 1, 70_000)],
)
def test_the_files_stay_within_their_bounds_however_often_they_are_filled_and_drained(
    open_spool, tmp_path, cap, messages, payload_bytes
):
    spool = open_spool(max_bytes=cap)
    number = 0
    for round_ in range(6):
        while spool.append(*batch(number, messages=messages, payload=b"x" * payload_bytes)):
            number += 1
            if number % 3 == 0 and round_ % 2:
                spool.remove(spool.first().sequence)
        assert (tmp_path / FILE_NAME).stat().st_size <= 1.25 * cap + MB
        assert size_on_disk(tmp_path) <= 1.25 * cap + MB + MOST_LOG_BYTES
        assert spool.bytes > cap / 2
        while spool.messages > 5 * messages * (round_ % 3):
            spool.remove(spool.first().sequence)


def test_a_large_file_is_given_back_to_the_disk_once_it_is_empty(open_spool, tmp_path):
    spool = open_spool()
    fill(spool, range(30), messages=1, payload=b"x" * MB)
    assert size_on_disk(tmp_path) > SHRINK_BYTES

    assert drain(spool) == list(range(30))

    assert size_on_disk(tmp_path) < MB
    spool.close()
    spool = open_spool()
    fill(spool, [31])
    assert drain(spool) == [31]


class FailingConnection:
    """A connection to the database on which statements that begin with this word fail with this error code."""

    def __init__(self, connection, code, *, word="INSERT"):
        self._connection = connection
        self._code = code
        self._word = word

    @property
    def in_transaction(self):
        return self._connection.in_transaction

    def execute(self, statement, *arguments):
        if statement.startswith(self._word):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = self._code
            raise error
        return self._connection.execute(statement, *arguments)

    def close(self):
        self._connection.close()


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE])
def test_a_disk_that_refuses_a_batch_is_full(open_spool, code):
    spool = open_spool()
    fill(spool, [1])
    spool._connection = FailingConnection(spool._connection, code)

    assert spool.append(*batch(2)) is False

    assert (spool.full, spool.messages) == (True, 3)


def test_a_disk_that_fails_to_make_a_batch_durable_is_an_error_for_nobody_knows_what_it_kept(open_spool):
    spool = open_spool()
    spool._connection = FailingConnection(spool._connection, sqlite3.SQLITE_IOERR_FSYNC)

    with pytest.raises(SpoolError, match=r"has failed: disk I/O error. Check the disk and the system's log"):
        spool.append(*batch(1))

    assert spool.messages == 0


def test_a_disk_that_fails_to_remove_a_batch_is_an_error_and_the_batch_is_still_there(open_spool):
    spool = open_spool()
    fill(spool, [1, 2])
    well = spool._connection
    spool._connection = FailingConnection(well, sqlite3.SQLITE_IOERR_FSYNC, word="DELETE")

    with pytest.raises(SpoolError, match=r"cannot remove a batch: disk I/O error"):
        spool.remove(spool.first().sequence)

    assert spool.messages == 6
    spool._connection = well
    assert drain(spool) == [1, 2]


def test_a_damaged_batch_stays_where_it_is_until_it_can_be_set_aside(open_spool):
    spool = open_spool()
    fill(spool, [1, 2])
    well = spool._connection
    well.execute("UPDATE batches SET checksum = checksum + 1 WHERE sequence = 1")
    spool._connection = FailingConnection(well, sqlite3.SQLITE_FULL)

    with pytest.raises(SpoolError, match=r"cannot be read: disk I/O error. Free space on its disk"):
        spool.first()

    assert (spool.messages, spool.damaged) == (6, 0)
    spool._connection = well
    assert drain(spool) == [2]
    assert (spool.messages, spool.damaged) == (0, 3)


def test_a_file_that_cannot_be_made_smaller_does_no_harm(open_spool, tmp_path):
    spool = open_spool()
    fill(spool, range(20), messages=1, payload=b"x" * MB)
    well = spool._connection
    spool._connection = FailingConnection(well, sqlite3.SQLITE_FULL, word="VACUUM")

    assert drain(spool) == list(range(20))

    assert size_on_disk(tmp_path) > SHRINK_BYTES
    spool._connection = well
    fill(spool, [21])
    assert drain(spool) == [21]
    assert size_on_disk(tmp_path) < MB


# -- threads


def test_threads_that_append_while_another_drains_lose_nothing_and_keep_their_order(open_spool):
    spool = open_spool(max_bytes=20_000)  # small: they also meet a full spool
    arrived, room = threading.Semaphore(0), threading.Semaphore(0)
    writers, batches = 4, 60
    errors, taken, refused = [], [], []

    def write(epoch):
        for number in range(batches):
            entry, content = batch(number, messages=1 + number % 20)
            entry = entry._replace(key=BatchKey(epoch, number))
            while not spool.append(entry, content):
                refused.append(entry.key)
                assert room.acquire(timeout=30)
            arrived.release()

    def take():
        for _ in range(writers * batches):
            assert arrived.acquire(timeout=30)
            spooled = spool.first()
            assert spooled.messages == batch(spooled.entry.key.batch, messages=len(spooled.messages))[1]
            assert spool.messages > 0
            assert 0 < spool.bytes <= 20_000
            assert spooled.entry.key in [entry.key for entry in spool.entries()]
            spool.remove(spooled.sequence)
            taken.append((spooled.sequence, spooled.entry.key))
            for _ in range(writers):
                room.release()

    def run(work, *arguments):
        try:
            work(*arguments)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(write, epoch)) for epoch in range(writers)]
    threads.append(threading.Thread(target=run, args=(take,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert len(taken) == writers * batches
    assert taken == sorted(taken)
    for epoch in range(writers):
        assert [key.batch for _, key in taken if key.owner_epoch == epoch] == list(range(batches))
    assert refused
    assert (spool.messages, spool.bytes, spool.first()) == (0, 0, None)
