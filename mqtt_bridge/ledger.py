"""Which deliveries are already committed: what makes QoS 1 an exactly-once effect.

MQTT redelivers whatever it has no PUBACK for, after a cut connection, a crash of the bridge or of the broker. A
redelivery must be recognised, or the message is stored twice. So every batch writes, in the transaction of its rows,
a *ledger row*: its key, and eight bytes for each of its deliveries. The `Ledger` holds the same facts in memory.

**Position.** Packet ids are 16 bits and wrap within a second on a fast stream. Each delivery therefore gets a 64-bit
position: the last one plus the signed distance of its packet id from the last id, modulo 65,535 (0 is no packet id).
What the broker may still redeliver never spans more than `REACH` positions, so the distance is never ambiguous.

**Fingerprint.** Eight bytes of topic, retain flag and payload. A redelivery is recognised by position *and*
fingerprint: positions alone would believe a broker that lost its state, fingerprints alone would drop a sensor that
says the same thing twice.

**Key.** (owner epoch, batch number), unique. A COMMIT whose answer was lost is tried again under the same key; if the
ledger row is there already, the first try succeeded. The owner epoch is raised whenever a process takes over the
client id, so a predecessor that is still alive can commit nothing more: it is fenced.

**Session.** When the broker has lost the session its ids start again: a raised session epoch makes all older entries
match nothing.

Invariants: a committed delivery whose PUBACK is unproven is in the ledger; nothing matches across more than `REACH`
positions or across sessions; only the current owner commits.

Threads: `Ledger` has no lock of its own. The pipeline calls it under its lock, `load` is called before any thread runs.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby, repeat, takewhile
from operator import itemgetter
from typing import Literal, NamedTuple

import structlog

from mqtt_bridge.model import Message
from mqtt_bridge.retained import Remembered

log = structlog.get_logger(__name__)

LAP = 65_535
"""Packet ids run from 1 to this, then start again."""
REACH = 30_000
"""How many positions a redelivery can reach back: less than half a lap, so that distances are never ambiguous."""
SWEEP = 2_000
"""What is out of reach is forgotten each time so many positions have passed: REACH + SWEEP is below half a lap too,
so what a restarted process finds in the database is never further away than a distance can tell."""

PRUNE_AT_ONCE = 100
"""Ledger rows deleted by one batch at most, to keep its statement small."""

Redelivery = Literal["marked", "unmarked", "renumbered"]
"""How the broker redelivers: with the DUP flag as the standard says, without it, or under new packet ids."""


class Seen(enum.Enum):
    """What a delivery is, compared with those that are known."""

    NEW = "new"
    PENDING = "pending"
    """Redelivered on a new connection while the first copy waits for its commit: acknowledge when that commits."""
    COMMITTED = "committed"
    """Redelivered after its commit: acknowledge in turn."""
    RESENT = "resent"
    """Sent again on the same connection, as some brokers do on a timer: its place in the receive order stands."""


class BatchKey(NamedTuple):
    """Names one batch for ever; the primary key of its ledger row, together with the client id."""

    owner_epoch: int
    batch: int


class BatchKeys:
    """A set of keys that takes a few bits for each: of a process that spooled for days there may be millions."""

    def __init__(self) -> None:
        self._blocks: defaultdict[tuple[int, int], int] = defaultdict(int)

    def add(self, key: BatchKey) -> None:
        """Put `key` in."""
        block, bit = divmod(key.batch, 1024)
        self._blocks[key.owner_epoch, block] |= 1 << bit

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, BatchKey):
            return False
        block, bit = divmod(key.batch, 1024)
        return self._blocks.get((key.owner_epoch, block), 0) >> bit & 1 == 1


class Entry(NamedTuple):
    """What one batch writes into the ledger. Made once, when the batch is formed, and never changed."""

    key: BatchKey
    session_epoch: int
    first_position: int
    fingerprints: bytes
    """Eight bytes for each position from the first on; eight zeros mark a position that is not in this batch."""
    pruned: tuple[BatchKey, ...] = ()
    """Rows that no redelivery and no retry needs any more: deleted on the way."""
    raises_session: bool = False
    """Whether the transaction must also write the session epoch into `owners`: no earlier one has been seen to."""

    def mark(self, position: int) -> bytes:
        """The fingerprint at a position."""
        start = 8 * (position - self.first_position)
        return self.fingerprints[start : start + 8]


@dataclass(frozen=True, slots=True)
class Claim:
    """What the database says when a process takes over a client id."""

    owner_epoch: int
    session_epoch: int
    entries: tuple[Entry, ...]
    """Those of the current session, but for batches that are in the spool."""
    subscriptions: frozenset[str] = frozenset()
    """Filters that the session at the broker is known to have."""
    retained: Remembered = field(default_factory=Remembered)
    """What is known of the retained messages of filters; a lost session changes nothing in it."""


def fingerprint(topic: bytes, payload: bytes, *, retain: bool) -> bytes:
    """Eight stable bytes of what does not change when a message is delivered again."""
    return fingerprints([topic], [payload], retain=retain)[0]


def fingerprints(topics: Sequence[bytes], payloads: Sequence[bytes], *, retain: bool) -> list[bytes]:
    """Those of a run."""
    flag, digest = (b"\x01" if retain else b"\x00"), blake2b
    return [
        digest(topic + flag + payload, digest_size=8).digest() for topic, payload in zip(topics, payloads, strict=True)
    ]


_GAP = bytes(8)
_POSITION, _FINGERPRINT = map(itemgetter, map(Message._fields.index, ("position", "fingerprint")))


class Ledger:
    """The deliveries of this session that may come again, and what became of them."""

    def __init__(self, *, redelivery: Redelivery = "marked") -> None:
        self._redelivery = redelivery
        self._matching = redelivery != "renumbered"
        self._owner_epoch = 0
        self._session_epoch = 0
        self._session_raised = False  # a raise of session_epoch that no transaction has committed yet
        self._session_start = 1  # positions below belong to earlier sessions
        self._batches = 0
        self._last_id: int | None = None
        self._last_position = 0
        self._highest = 0  # highest position ever given
        self._swept = 0  # the same when what is out of reach was last forgotten
        self._pending: dict[int, bytes] = {}
        self._committed: dict[int, Entry] = {}
        self._here: dict[int, bytes] = {}  # what was delivered on the current connection and is not proven
        self._first_here = True  # nothing has been delivered on the current connection yet
        self._unproven: dict[BatchKey, int] = {}  # entries per ledger row that may still be redelivered
        self._prunable: list[BatchKey] = []  # rows to delete with the next batch
        self._spooled: set[BatchKey] = set()  # of _unproven: those on the disk, whose rows stay until they are off it
        self._noted = 0  # highest position that a row was made for, or that counting began from

    # -- start and connections

    def load(self, claim: Claim, spooled: Iterable[Entry] = ()) -> None:
        """Begin with what the database knows of this client id, and with what is in the spool, oldest first."""
        self._owner_epoch = claim.owner_epoch
        self._session_epoch = claim.session_epoch
        for entry in claim.entries:
            self._remember(entry)
        for entry in spooled:
            if entry.fingerprints and entry.session_epoch == claim.session_epoch:
                self._spooled.add(entry.key)
                self._remember(entry)
        if self._highest:
            self._last_position = self._noted = self._highest
            self._last_id = (self._last_position - 1) % LAP + 1
        self._forget_out_of_reach()

    def _remember(self, entry: Entry) -> None:
        first = entry.first_position
        stop = first + len(entry.fingerprints) // 8
        self._commit(entry, [position for position in range(first, stop) if entry.mark(position) != _GAP])
        self._reach(stop - 1)

    def connected(self, *, session_present: bool) -> None:
        """A connection begins. Without its session the broker counts anew: nothing older may match."""
        self._here.clear()
        self._first_here = True
        if not session_present:
            self._begin_session()

    def _begin_session(self) -> None:
        self._matching = self._redelivery != "renumbered"
        self._forget_the_session()
        self._pending.clear()
        self._start_counting_anew()
        self._session_start = self._last_position + 1

    def _forget_the_session(self) -> None:
        """Raise the session epoch: what is committed so far can match nothing any more, in no later process either.

        The rows are kept until they are settled: one may belong to a batch whose COMMIT answer was lost, and its retry
        needs the row.
        """
        self._session_epoch += 1
        self._session_raised = True
        self._prunable.extend(key for key in self._unproven if key not in self._spooled)
        self._unproven.clear()
        self._spooled.clear()
        self._committed.clear()

    def _start_counting_anew(self) -> None:
        """Continue at the next lap, so that position and packet id stay congruent and positions stay unique."""
        self._last_position = self._highest = self._noted = -(-self._highest // LAP) * LAP
        self._last_id = None

    # -- receiving

    def place(self, packet_id: int, mark: bytes, *, dup: bool) -> tuple[int, Seen]:
        """The position of a QoS 1 delivery with fingerprint `mark`, and whether it is known."""
        position, forward = self._position(packet_id)
        if self._matching and (dup or self._redelivery == "unmarked"):
            seen = self._recognise(position, mark, dup=dup)
            if seen is not Seen.NEW:
                self._arrive(position, packet_id, mark)
                return position, seen
        if not self._matching:
            position = self._highest + 1
        elif position in self._pending or position in self._committed or not (forward or dup or self._goes_back()):
            position = self._lose_count(packet_id, dup=dup)
        self._arrive(position, packet_id, mark)
        self._pending[position] = mark
        return position, Seen.NEW

    def place_run(self, packet_ids: Sequence[int], marks: Sequence[bytes]) -> range | None:
        """The positions of deliveries that are new beyond doubt: their ids go on from the highest ever, gapless.

        With DUP as well: a broker that was cut off sends again what had not reached us.

        None where that is not so, and nothing is changed then: `place` them one by one. This is the same for nearly
        everything that ever comes, at the speed of C.
        """
        first_id = packet_ids[0]
        distance = first_id if self._last_id is None else (first_id - self._last_id) % LAP
        if (self._last_id is not None and distance > LAP // 2) or not _are_gapless(packet_ids):
            return None
        first = self._last_position + distance if self._matching else self._highest + 1
        if first <= self._highest:
            return None
        positions = range(first, first + len(packet_ids))
        self._here.update(zip(positions, marks, strict=True))
        self._pending.update(zip(positions, marks, strict=True))
        self._first_here = False
        self._last_position, self._last_id = positions[-1], packet_ids[-1]
        self._reach(positions[-1])
        return positions

    def _goes_back(self) -> bool:
        """Whether a broker that does not mark redeliveries may step back now: it redelivers first, and in order."""
        return self._redelivery == "unmarked" and self._first_here

    def _position(self, packet_id: int) -> tuple[int, bool]:
        if self._last_id is None:
            return self._last_position + packet_id, True
        distance = (packet_id - self._last_id) % LAP
        if distance > LAP // 2:
            distance -= LAP
        if self._last_position + distance < self._session_start:  # older than all that is known: nothing to compare
            self._start_counting_anew()
            return self._last_position + packet_id, True
        return self._last_position + distance, distance > 0

    def _recognise(self, position: int, mark: bytes, *, dup: bool) -> Seen:
        if self._pending.get(position) == mark:
            return Seen.RESENT if position in self._here else Seen.PENDING
        if self._here.get(position) == mark:
            # Acknowledged on this connection. Without DUP it is no resend, but a freed packet id that is used again.
            return Seen.RESENT if dup else Seen.NEW
        committed = self._committed.get(position)
        return Seen.COMMITTED if committed is not None and committed.mark(position) == mark else Seen.NEW

    def _arrive(self, position: int, packet_id: int, mark: bytes) -> None:
        self._here[position] = mark
        self._first_here = False
        self._last_position, self._last_id = position, packet_id
        self._reach(position)

    def _reach(self, position: int) -> None:
        self._highest = max(self._highest, position)
        if self._highest - self._swept > SWEEP:
            self._forget_out_of_reach()

    def _lose_count(self, packet_id: int, *, dup: bool) -> int:
        """The broker's ids step as no incrementing broker's do: positions can no longer be trusted to match."""
        log.warning(
            "packet ids of the broker step back: redeliveries are no longer recognised in this session, "
            "a message may be stored twice; set MQTT_REDELIVERY=renumbered if this broker always does so",
            packet_id=packet_id,
            last_packet_id=self._last_id,
            dup=dup,
        )
        self._matching = False
        self._forget_the_session()
        return self._highest + 1

    # -- batches

    def entry(self, messages: Sequence[Message]) -> Entry:
        """The ledger row of a new batch of these messages, with a key of its own."""
        self._batches += 1
        key = BatchKey(self._owner_epoch, self._batches)
        first, fingerprints = self._fingerprints(messages)
        return Entry(key, self._session_epoch, first, fingerprints, self.take_prunable(), self._session_raised)

    def _fingerprints(self, messages: Sequence[Message]) -> tuple[int, bytes]:
        # Deliveries of an earlier session are left out: the broker has forgotten them, they cannot come again.
        positions = list(map(_POSITION, messages))
        if self._matching and min(positions, default=0) >= self._session_start and _are_gapless(positions):
            self._noted = max(self._noted, positions[-1])
            return positions[0], b"".join(map(_FINGERPRINT, messages))
        marks = {m.position: m.fingerprint for m in messages if m.position >= self._session_start}
        if not marks or not self._matching:
            return 0, b""
        first, last = min(marks), max(marks)
        self._noted = max(self._noted, last)
        return first, b"".join(marks.get(position, _GAP) for position in range(first, last + 1))

    def settled(self, entry: Entry, messages: Sequence[Message]) -> None:
        """The transaction of this batch was committed."""
        if entry.raises_session:
            self.session_raised(entry.session_epoch)
        self._settle(entry, messages)

    def spooled(self, entry: Entry, messages: Sequence[Message]) -> None:
        """This batch is on the disk: as good as committed, but it has no row yet, and needs it until `drained`."""
        self._spooled.add(entry.key)
        self._settle(entry, messages)

    def drained(self, entry: Entry) -> None:
        """This batch was committed, and is out of the spool for good: no further try can need its row."""
        if entry.raises_session:
            self.session_raised(entry.session_epoch)
        if entry.key in self._unproven:
            self._spooled.discard(entry.key)
        else:
            self._prunable.append(entry.key)

    def _settle(self, entry: Entry, messages: Sequence[Message]) -> None:
        positions = list(map(_POSITION, messages))
        marks = list(map(self._pending.pop, positions, repeat(None)))
        if not entry.fingerprints or entry.session_epoch != self._session_epoch:
            positions = []
        elif None in marks:  # of an earlier session, or of QoS 0
            positions = [position for position, mark in zip(positions, marks, strict=True) if mark is not None]
        self._commit(entry, positions)
        if not positions:
            self._release_row(entry.key)

    @property
    def lags(self) -> bool:
        """Whether positions have moved on so far that the database should be told, though nothing is to be stored."""
        return self._matching and self._highest - self._noted > REACH // 3

    def _commit(self, entry: Entry, positions: Sequence[int]) -> None:
        self._committed.update(dict.fromkeys(positions, entry))
        self._unproven[entry.key] = len(positions)

    @property
    def session_to_raise(self) -> int | None:
        """The session epoch that the database does not know yet, or None."""
        return self._session_epoch if self._session_raised else None

    def session_raised(self, session_epoch: int) -> None:
        """A transaction that wrote this session epoch was committed."""
        if session_epoch == self._session_epoch:
            self._session_raised = False

    def forget(self, positions: Iterable[int]) -> None:
        """These deliveries are done with, and no transaction holds them: ignored on purpose."""
        for position in positions:
            self._pending.pop(position, None)

    # -- pruning

    def prove(self, positions: Iterable[int]) -> None:
        """The broker has seen the PUBACKs of these: they cannot come again."""
        positions = list(positions)
        for _ in map(self._here.pop, positions, repeat(None)):
            pass
        # Neighbours were mostly committed by the same batch.
        for entry, proven in groupby(map(self._committed.pop, positions, repeat(None))):
            if entry is not None:
                self._unproven[entry.key] -= len(list(proven))
                if not self._unproven[entry.key]:
                    self._release_row(entry.key)

    def take_prunable(self) -> tuple[BatchKey, ...]:
        """Some ledger rows that no redelivery and no retry needs any more; the caller deletes or gives them back."""
        taken, self._prunable = tuple(self._prunable[:PRUNE_AT_ONCE]), self._prunable[PRUNE_AT_ONCE:]
        return taken

    def give_back(self, keys: Sequence[BatchKey]) -> None:
        """The caller of `take_prunable` could not delete these."""
        self._prunable[:0] = keys

    def _release_row(self, key: BatchKey) -> None:
        """Nothing of this batch can come again. The row of one that is on the disk is released by `drained`."""
        del self._unproven[key]
        if key in self._spooled:
            self._spooled.discard(key)
        else:
            self._prunable.append(key)

    def _forget_out_of_reach(self) -> None:
        """Positions too old to come again. Acknowledged before a cut, the broker never mentions them."""
        self._swept = self._highest
        floor = self._highest - REACH
        self.prove(_oldest(self._committed, floor))
        for position in _oldest(self._here, floor):
            del self._here[position]


def _are_gapless(numbers: Sequence[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _oldest(positions: Iterable[int], floor: int) -> list[int]:
    """Those below `floor`, as far as they stand in front.

    They stand in the order of their arrival or commit, which is theirs but for neighbours: one that stands behind a
    newer one is found a little later, and matches nothing meanwhile, since no distance reaches so far back.
    """
    return list(takewhile(lambda position: position < floor, positions))
