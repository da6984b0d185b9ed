"""The disk buffer against a real disk: processes that are killed, disks that are full, directories that are shared."""

from __future__ import annotations

import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from mqtt_bridge import spool as module
from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.model import Message
from mqtt_bridge.spool import FILE_NAME, Spool, SpoolError

ROOT = Path(__file__).parents[2]
MB = 1 << 20


def batch(number, *, payload_bytes=None):
    """A batch whose content follows from its number, so that whoever reads it can tell whether it is whole."""
    chance = random.Random(number)
    sizes = [payload_bytes] if payload_bytes else [chance.randrange(400) for _ in range(chance.randrange(1, 60))]
    content = [
        Message(b"devices/%d" % i, chance.randbytes(size), 1, False, number, 100 * number + i, chance.randbytes(8))
        for i, size in enumerate(sizes)
    ]
    return Entry(BatchKey(1, number), 1, 100 * number, b"".join(m.fingerprint for m in content)), content


# Appends batches from the number in its third argument on, each acknowledged on standard output once it is durable, and
# removes every third. Ends when the spool is full. The fourth argument limits the size of files.
WRITER = """
import resource, sys
from pathlib import Path
import structlog
from mqtt_bridge.spool import Spool
from tests.integration.test_spool import batch

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
directory, max_bytes, number, limit_bytes = Path(sys.argv[1]), *map(int, sys.argv[2:])
spool = Spool(directory, client_id="bridge", max_bytes=max_bytes)
spool.open()
print("open", 0, flush=True)
if limit_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
while spool.append(*batch(number)):
    print("appended", number, flush=True)
    if number % 3 == 0:
        spooled = spool.first()
        print("removing", spooled.entry.key.batch, flush=True)
        spool.remove(spooled.sequence)
        print("removed", spooled.entry.key.batch, flush=True)
    number += 1
print("full", spool.messages, flush=True)
sys.stdin.read()
"""


def start_writer(directory, *, max_bytes=1 << 30, number=1, limit_bytes=0):
    arguments = [str(directory), str(max_bytes), str(number), str(limit_bytes)]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(line):
    word, number = line.split()
    return word, int(number)


def numbers(events, word):
    return [number for what, number in events if what == word]


@pytest.fixture
def open_spool(tmp_path):
    """Opens a spool, again and again if the test likes; all are closed after the test."""
    opened = []

    def open_(directory=tmp_path, *, max_bytes=1 << 30):
        spool = Spool(directory, client_id="bridge", max_bytes=max_bytes)
        opened.append(spool)
        spool.open()
        return spool

    yield open_
    for spool in opened:
        spool.close()


def content(spool):
    """The numbers of the batches in the spool, which is emptied; each batch must be whole."""
    found = []
    while spooled := spool.first():
        number = spooled.entry.key.batch
        assert (spooled.entry, spooled.messages) == batch(number)
        spool.remove(spooled.sequence)
        found.append(number)
    return found


# -- kill -9


def test_what_was_acknowledged_survives_kill_9_at_any_moment_in_order_and_whole(tmp_path):
    chance = random.Random()
    appended, removed = 0, 0
    for _ in range(12):
        with start_writer(tmp_path, number=appended + 1) as writer:
            for _ in range(chance.randrange(1, 300)):
                word, number = said(writer.stdout.readline())
                appended, removed = update(word, number, appended, removed)
            writer.kill()
            for line in writer.stdout:
                if line.endswith("\n"):
                    appended, removed = update(*said(line), appended, removed)

        spool = Spool(tmp_path, client_id="bridge", max_bytes=1 << 30)
        spool.open()
        there = [entry.key.batch for entry in spool.entries()]

        # At most one append and one removal were under way, and those may have happened or not.
        assert there[0] in (removed + 1, removed + 2)
        assert there[-1] in (appended, appended + 1)
        assert there == list(range(there[0], there[-1] + 1))
        assert spool.damaged == 0
        assert spool.messages == sum(len(batch(number)[1]) for number in there)
        appended, removed = there[-1], there[0] - 1
        spool.close()
    assert content_of(tmp_path) == there


def update(word, number, appended, removed):
    """The last batch that was acknowledged to be in, and the last that was acknowledged to be out."""
    if word == "appended":
        assert number == appended + 1
        return number, removed
    if word == "removed":
        assert number == removed + 1
        return appended, number
    return appended, removed


def content_of(directory):
    spool = Spool(directory, client_id="bridge", max_bytes=1 << 30)
    spool.open()
    try:
        return content(spool)
    finally:
        spool.close()


# -- two processes


def test_a_directory_belongs_to_one_process_until_that_ends(open_spool, tmp_path):
    with start_writer(tmp_path) as writer:
        assert writer.stdout.readline() == "open 0\n"

        with pytest.raises(SpoolError, match="is in use by another process"):
            open_spool()

        writer.kill()
        writer.stdout.read()

    assert open_spool().damaged == 0


# -- full disks


def test_a_limit_on_file_size_means_full_and_loses_nothing(open_spool, tmp_path):
    """As a quota does: the disk has room, but writing fails all the same."""
    with start_writer(tmp_path, limit_bytes=3 * MB) as writer:
        events = []
        while not events or events[-1][0] != "full":
            events.append(said(writer.stdout.readline()))
        writer.kill()

    there = numbers(events, "appended")[len(numbers(events, "removed")) :]
    assert len(there) > 50
    assert content(open_spool()) == there


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 48 MB that holds nothing else. Without the right to mount one there is nothing to test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk needs root; a limit on file size is tested instead ({mounted.stderr})")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(spool, first, **kwargs):
    """Append batches until there is no room; the numbers of those that were acknowledged."""
    number = first
    while spool.append(*batch(number, **kwargs)):
        number += 1
    assert spool.full
    return list(range(first, number))


def take_all_space(path):
    """Write a file until there is not one byte left."""
    with path.open("wb", buffering=0) as file:
        for size in (MB, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


def test_a_disk_that_the_spool_itself_has_filled_is_drained_and_filled_again(small_disk, open_spool):
    spool = open_spool(small_disk)
    expected = fill(spool, 1)
    assert spool.bytes > 16 * MB

    # Half of it drained and filled again, then again after a restart.
    for _ in range(2):
        for number in expected[: len(expected) // 2]:
            spooled = spool.first()
            assert (spooled.entry, spooled.messages) == batch(number)
            spool.remove(spooled.sequence)
        more = fill(spool, expected[-1] + 1)
        assert len(more) > len(expected) // 4
        expected = expected[len(expected) // 2 :] + more
        spool.close()
        spool = open_spool(small_disk)
        assert [entry.key.batch for entry in spool.entries()] == expected

    assert content(spool) == expected
    assert (small_disk / FILE_NAME).stat().st_size < MB


def test_a_disk_that_others_have_filled_refuses_batches_and_keeps_what_it_has(small_disk, open_spool, monkeypatch):
    # Without its reserve: the disk fills up between the look at it and the writing.
    monkeypatch.setattr(module, "RESERVE_BYTES", -(1 << 40))
    spool = open_spool(small_disk)
    expected = [1, 2, 3]
    for number in expected:
        assert spool.append(*batch(number))
    take_all_space(small_disk / "of others")

    assert not any(spool.append(*batch(number, payload_bytes=5 * MB)) for number in range(4, 14))

    assert spool.full
    assert (spool.first().entry, spool.first().messages) == batch(1)
    spool.close()
    (small_disk / "of others").unlink()
    spool = open_spool(small_disk)
    assert spool.append(*batch(4))
    assert content(spool) == [*expected, 4]


def test_a_removal_that_the_disk_has_no_room_for_fails_and_succeeds_later(small_disk, open_spool, monkeypatch):
    monkeypatch.setattr(module, "RESERVE_BYTES", -(1 << 40))
    spool = open_spool(small_disk)
    expected = fill(spool, 1)  # to the last byte: the log is full, and the file cannot grow

    take_all_space(small_disk / "of others")

    with pytest.raises(SpoolError, match="Free space on its disk"):
        content(spool)

    removed = expected.index(spool.first().entry.key.batch)
    assert spool.messages == sum(len(batch(number)[1]) for number in expected[removed:])
    spool.close()
    subprocess.run(["mount", "-o", "remount,size=96m", small_disk], check=True)

    assert content(open_spool(small_disk)) == expected[removed:]


def test_a_disk_that_others_have_filled_is_drained_with_the_room_that_the_log_gives_up(small_disk, open_spool):
    spool = open_spool(small_disk)
    for number in range(1, 401):
        assert spool.append(*batch(number))
    spool.close()
    spool = open_spool(small_disk)  # all is in the file now, and the log is gone
    for _ in range(20):
        spool.remove(spool.first().sequence)

    take_all_space(small_disk / "of others")

    assert not spool.append(*batch(401))
    assert content(spool) == list(range(21, 401))


# -- large


def test_a_message_of_100_mb_goes_in_and_comes_out(open_spool, tmp_path):
    spool = open_spool()
    payload = random.Random(1).randbytes(100 * MB)
    entry, small = batch(1)
    large = Message(b"camera/1", payload, 1, False, 1, 1, b"12345678", {"ContentType": "video/mp4"})

    assert spool.append(entry, [*small, large])
    spool.close()
    spool = open_spool()
    spooled = spool.first()

    assert spooled.entry == entry
    assert spooled.messages == [*small, large]
    spool.remove(spooled.sequence)
    assert spool.append(*batch(2))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10 * MB


def test_a_message_beyond_the_cap_is_refused(open_spool):
    spool = open_spool(max_bytes=MB)

    assert spool.append(batch(1)[0], [Message(b"camera/1", bytes(2 * MB), 1, False, 1)]) is False

    assert content(spool) == []
