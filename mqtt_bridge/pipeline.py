"""From the subscriber to the database and back: queue, worker threads, batches, settling.

The network thread puts messages in with `receive`, which only books and queues them. Workers, long-lived tasks of a
thread pool, take batches, translate them, have the sink store them, and settle: the outcome is counted, the ledger
told, and the PUBACKs released. A message is settled in one place, `_settle`, and nowhere else.

Invariants: nothing leaves the queue but into a batch, and no batch is given up but by a commit, or by the end of the
process (then it stays unacknowledged, and the broker keeps it); the account balances whenever the lock is free.

Threads: `receive` and `connected` run in the network thread, `_work` in the workers, all else in any. One lock guards
queue, account and ledger, so that a message changes its place in all three at once.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import Protocol

import structlog

from mqtt_bridge.account import Account, Balance
from mqtt_bridge.acks import AckTracker, SendAcks
from mqtt_bridge.batches import Batches, Work
from mqtt_bridge.complaints import Complaint
from mqtt_bridge.dead_letter_share import DeadLetterShare
from mqtt_bridge.errors import Fenced
from mqtt_bridge.ledger import BatchKey, Entry, Ledger, Seen, fingerprints
from mqtt_bridge.model import DeadLetter, Message, Run
from mqtt_bridge.pace import Pace
from mqtt_bridge.sink import Stopped
from mqtt_bridge.transactions import Batch, Stored

log = structlog.get_logger(__name__)

MESSAGE_OVERHEAD = 570
"""Bytes that a queued message costs beside its topic and payload, with its traces in ledger and receive order; measured
with tracemalloc on CPython 3.11, x86-64."""
BATCH_BYTES = 8 << 20
"""A batch ends early when its payloads exceed this, so that large messages do not make huge transactions."""
LONGEST_REST_S = 0.001
"""Of the network thread, after it has received little while much is coming: waking up costs more than a message."""
CROWDED = 0.8
"""The share of the queue from which on there is no time to wait for a database that fails, if there is a spool."""


class Store(Protocol):
    """What the pipeline needs of the sink, or of the diversion where there is a spool."""

    def store(self, batch: Batch) -> Stored | None:
        """Return when `batch` is durable, None if that is on the disk; `Stopped` or `Fenced` if it never will be."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the pipeline holds, and how it forms batches."""

    workers: int = 2
    batch_size: int = 2000
    batch_wait_s: float = 0.005
    queue_size: int = 20_000
    queue_bytes: int = 64 << 20


_TOPIC, _PAYLOAD, _QOS, _RECEIVED_US, _POSITION = map(
    itemgetter, map(Message._fields.index, ("topic", "payload", "qos", "received_us", "position"))
)


def _cost(messages: Sequence[Message]) -> tuple[int, int]:
    """How many they are, and the memory they take."""
    count = len(messages)
    payloads, topics = sum(map(len, map(_PAYLOAD, messages))), sum(map(len, map(_TOPIC, messages)))
    return count, topics + payloads + count * MESSAGE_OVERHEAD


class Pipeline:
    """Moves messages from `receive` into the sink, and their acknowledgements into `acks`."""

    def __init__(
        self,
        batches: Batches,
        store: Store,
        *,
        ledger: Ledger,
        acks: AckTracker,
        limits: Limits,
        on_fatal: Callable[[BaseException], None],
        on_session_lost: Callable[[], object] = lambda: None,
        linger_s: Callable[[], float] = lambda: 0.0,
        wants_replay: Callable[[bytes], bool] = lambda topic: True,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """`on_fatal` hears of what ends the bridge: `Fenced`, or an error that a worker cannot survive.

        `on_session_lost` is called when `session_to_raise` has something to say; it must not block. `linger_s`: how
        long a batch may wait for more messages at the moment, where that is longer than `batch_wait_s`.
        `wants_replay` says whether a retained message of this topic, replayed by the broker, is to be stored.
        """
        self._batches = batches
        self._store = store
        self._acks = acks
        self._limits = limits
        self._on_fatal = on_fatal
        self._on_session_lost = on_session_lost
        self._linger_s = linger_s
        self._wants_replay = wants_replay
        self._clock_us = clock_us
        self._executor: ThreadPoolExecutor | None = None
        self._futures: list[Future[None]] = []
        self._lock = threading.Lock()
        # Guarded by the lock, with conditions that say what has changed:
        self._arrived = threading.Condition(self._lock)
        self._settled = threading.Condition(self._lock)
        self._queue: deque[Message] = deque()
        self._untold: set[BatchKey] = set()  # batches in hand: nothing but their worker knows what became of them
        self._in_hand: dict[int, list[Message]] = {}  # by worker thread; settled messages leave at the front
        self._taken: Counter[int] = Counter()  # batches by worker thread
        self._held = 0  # messages in the queue and in hand, and what they cost
        self._held_bytes = 0
        self._owed = 0  # those of them that are QoS 1
        self._owed_bytes = 0
        self._account = Account()
        self._pace = Pace()
        self._complaint = Complaint()
        self._share = DeadLetterShare()
        self._ledger = ledger
        self._draining = False
        self._stopped = False

    # -- start and stop

    def found_in_spool(self, count: int) -> None:
        """So many messages wait on the disk since before this process: in its account they count as received."""
        with self._lock:
            self._account.received += count
            self._account.book("spooled", count)

    def start(self) -> None:
        """Start the workers. Idempotent."""
        if self._executor is None:
            workers = self._limits.workers
            self._executor = ThreadPoolExecutor(workers, thread_name_prefix="mqtt-bridge-worker")
            self._futures = [self._executor.submit(self._work) for _ in range(workers)]

    def drain(self, timeout_s: float) -> bool:
        """Stop lingering, and wait until nothing is in flight; False when that took too long."""
        with self._lock:
            self._draining = True
            self._arrived.notify_all()
            return self._settled.wait_for(lambda: not self._held, timeout_s)

    def stop(self, timeout_s: float = 10.0) -> bool:
        """End the workers; False when one still hangs in the database after `timeout_s`.

        What they could not store stays unacknowledged. Idempotent, safe when never started.
        """
        with self._lock:
            self._stopped = True
            self._arrived.notify_all()
            self._settled.notify_all()
        if self._executor is not None:
            self._executor.shutdown(wait=False)
        return not wait(self._futures, timeout_s).not_done

    def give_up(self) -> tuple[int, int]:
        """After `stop`: what could not be stored, as (left to the broker, lost). The lost ones are booked as dropped.

        QoS 1 was not acknowledged, so the broker keeps it; QoS 0 is nobody's any more.
        """
        with self._lock:
            held = [*self._queue, *(message for messages in self._in_hand.values() for message in messages)]
            lost = [message for message in held if not message.qos]
            self._account.book("dropped", len(lost))
            self._hold(lost, -1)
            self._queue = deque(message for message in self._queue if message.qos)
            for worker, messages in self._in_hand.items():
                self._in_hand[worker] = [message for message in messages if message.qos]
            return len(held) - len(lost), len(lost)

    @property
    def alive(self) -> bool:
        """Whether every worker runs, as it should from `start` to `stop`."""
        return bool(self._futures) and not any(future.done() for future in self._futures)

    # -- the network thread

    def connected(self, *, session_present: bool, send_acks: SendAcks) -> None:
        """A connection to the broker begins: its acknowledgements go to `send_acks`."""
        with self._lock:
            self._ledger.connected(session_present=session_present)
            self._acks.open(send_acks)
        if not session_present:
            self._on_session_lost()

    def disconnected(self) -> None:
        """The connection has ended: nothing may be acknowledged until the next one."""
        self._acks.close()

    def receive(self, run: Run) -> None:
        """Take messages in. Never blocks on the database, never raises for the sake of a message."""
        now_us = self._clock_us()
        if run.qos == 0:
            self._receive_unacknowledged([self._message(run, index, now_us) for index in range(len(run.topics))])
            return
        retain = run.retain
        marks = fingerprints(run.topics, run.payloads, retain=retain)
        if retain or not self._receive_plain(run, marks, now_us):
            for index, mark in enumerate(marks):
                self._receive_one(self._message(run, index, now_us), run.packet_ids[index], mark, dup=run.dup)

    def _receive_plain(self, run: Run, marks: Sequence[bytes], now_us: int) -> bool:
        """The hot path: all of a run at once, where its ids go on from the last one, as they nearly always do."""
        new, class_ = tuple.__new__, Message  # half the price of Message(...)
        with self._lock:
            # Decided here: all these are new, and where they stand in this connection's receive order.
            positions = self._ledger.place_run(run.packet_ids, marks)
            if positions is None:
                return False
            messages = [
                new(class_, (topic, payload, 1, False, now_us, position, mark, properties, False))
                for topic, payload, position, mark, properties in zip(
                    run.topics, run.payloads, positions, marks, run.properties, strict=True
                )
            ]
            self._account.received += len(messages)
            self._acks.add_run(positions, run.packet_ids)
            self._enqueue(messages)
        return True

    def _receive_one(self, message: Message, packet_id: int, mark: bytes, *, dup: bool) -> None:
        with self._lock:
            # Decided here: is this delivery new, and where does it stand in this connection's receive order?
            self._account.received += 1
            position, seen = self._ledger.place(packet_id, mark, dup=dup)
            if seen is not Seen.RESENT:
                self._acks.add(position, packet_id, finished=seen is Seen.COMMITTED)
            if seen is Seen.NEW:
                self._enqueue([message._replace(position=position, fingerprint=mark)])
            else:
                self._account.book("duplicate")

    def _receive_unacknowledged(self, messages: Sequence[Message]) -> None:
        with self._lock:
            # Decided here: QoS 0 is dropped, newest first, when there is no room; nothing else ever is.
            self._account.received += len(messages)
            room = 0 if self._held_bytes >= self._limits.queue_bytes else max(0, self._limits.queue_size - self._held)
            self._enqueue(messages[:room])
            self._account.book("dropped", len(messages) - len(messages[:room]))

    def _message(self, run: Run, index: int, now_us: int) -> Message:
        topic = run.topics[index]
        return Message(
            topic,
            run.payloads[index],
            run.qos,
            run.retain,
            now_us,
            properties=run.properties[index],
            # Counted by a worker where it is not wanted, for the ledger may need a row of it.
            unwanted=run.retain and not self._wants_replay(topic),
        )

    def _enqueue(self, messages: Sequence[Message]) -> None:
        if not messages:
            return
        before = len(self._queue)
        self._queue.extend(messages)
        self._hold(messages, 1)
        # Wake a worker for the first message, and when a batch is full: not for each.
        batch_size = self._limits.batch_size
        if not before or before // batch_size != len(self._queue) // batch_size:
            self._arrived.notify()

    def _hold(self, messages: Sequence[Message], sign: int) -> None:
        """Count messages in (1) or out (-1) of what is held."""
        count, size_bytes = _cost(messages)
        self._held += sign * count
        self._held_bytes += sign * size_bytes
        if not all(map(_QOS, messages)):
            count, size_bytes = _cost(list(filter(_QOS, messages)))
        self._owed += sign * count
        self._owed_bytes += sign * size_bytes

    @property
    def full(self) -> bool:
        """Whether as much QoS 1 is held as may be: then the subscriber should stop reading.

        QoS 0 does not count: a flood of it is dropped, and must not keep QoS 1 out.
        """
        return self._owed >= self._limits.queue_size or self._owed_bytes >= self._limits.queue_bytes

    @property
    def crowded(self) -> bool:
        """Whether the queue, QoS 0 included, is nearly full."""
        limits = self._limits
        return self._held >= CROWDED * limits.queue_size or self._held_bytes >= CROWDED * limits.queue_bytes

    @property
    def rest_s(self) -> float:
        """How long the network thread may rest after it has received next to nothing, for more to come together."""
        return LONGEST_REST_S * self._pace.busy

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until there is room again; False when that takes longer than `timeout_s`."""
        with self._lock:
            return self._settled.wait_for(lambda: self._stopped or not self.full, timeout_s)

    def wait_until_settled(self, timeout_s: float) -> None:
        """Wait until something more is settled, at most `timeout_s`."""
        with self._lock:
            self._settled.wait(timeout_s)

    # -- the workers

    def _work(self) -> None:
        """A worker's life. An error here is a bug or the end: it must not die unseen, holding its batch."""
        try:
            while messages := self._take():
                self._process(messages)
        except Stopped:
            log.debug("a worker has stopped with a batch in hand")
        except Fenced as error:
            self._on_fatal(error)
        except BaseException as error:
            log.critical("a worker has died; its batch stays unacknowledged", exc_info=True)
            self._on_fatal(error)

    def _take(self) -> list[Message]:
        """The next batch: whatever is there after a short wait for more. Empty when the pipeline stops."""
        with self._lock:
            # Decided here: which messages are in whose hands.
            messages: list[Message] = []
            while not messages:
                self._arrived.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return []
                self._linger()
                messages = self._pop()
            if self._queue:
                self._arrived.notify()  # more than one batch was waiting
            self._in_hand[threading.get_ident()] = list(messages)
            self._taken[threading.get_ident()] += 1
            return messages

    def _linger(self) -> None:
        """Give a small batch until `batch_wait_s` after its first message to grow."""
        self._pace.note(self._account.received)
        wait_s = max(self._limits.batch_wait_s, self._linger_s())
        while self._queue and len(self._queue) < self._limits.batch_size and not (self._draining or self._stopped):
            left_s = wait_s - (self._clock_us() - self._queue[0].received_us) / 1e6
            # The clock may have been set back meanwhile: never wait for longer than asked.
            if left_s <= 0 or not self._arrived.wait(min(left_s, wait_s)):
                return

    def _pop(self) -> list[Message]:
        take = self._queue.popleft
        messages = [take() for _ in range(min(len(self._queue), self._limits.batch_size))]
        if sum(map(len, map(_PAYLOAD, messages))) > BATCH_BYTES:
            sizes = accumulate(map(len, map(_PAYLOAD, messages)))
            count = 1 + sum(size < BATCH_BYTES for size in sizes)
            self._queue.extendleft(reversed(messages[count:]))
            del messages[count:]
        return messages

    def _process(self, messages: list[Message]) -> None:
        for work in self._batches.parts(messages):
            with self._lock:
                needless = work.is_needless and not self._ledger.lags
                entry = None if needless else self._ledger.entry(work.messages)
                if entry is not None:
                    self._untold.add(entry.key)
            stored = self._store.store(work.batch(entry)) if entry else Stored()
            self._settle(work, entry, stored)

    def _settle(self, work: Work, entry: Entry | None, stored: Stored | None) -> None:
        """The one place where messages leave the bridge's memory: tell the ledger, acknowledge, count."""
        messages = work.messages
        positions = list(filter(None, map(_POSITION, messages)))  # those of QoS 0 have none
        with self._lock:
            # Before the PUBACKs: a redelivery that crosses them must find its commit here.
            if entry is None:
                self._ledger.forget(positions)
            elif stored is None:
                self._ledger.spooled(entry, messages)
            else:
                self._ledger.settled(entry, messages)
        self._acks.finish(positions)
        with self._lock:
            # After the PUBACKs: who waits for the pipeline to be empty may rely on them being sent.
            if stored is None:
                self._account.book("spooled", len(messages))
            else:
                self._book(work, stored)
            if entry is not None:
                self._untold.discard(entry.key)
            del self._in_hand[threading.get_ident()][: len(messages)]
            self._hold(messages, -1)
            self._settled.notify_all()

    def drained(self, entries: Sequence[Entry], work: Work, stored: Stored) -> None:
        """Batches that were on the disk are in the database now, and off the disk for good.

        The drainer may be faster than the worker that put a batch there: then it waits until that has told of it, or
        the row would be pruned before its PUBACKs. `Stopped` when the pipeline stops first.
        """
        keys = [entry.key for entry in entries]
        with self._lock:
            self._settled.wait_for(lambda: self._stopped or self._untold.isdisjoint(keys))
            if not self._untold.isdisjoint(keys):
                raise Stopped("the bridge stopped before a worker had told of its batch")
            for entry in entries:
                self._ledger.drained(entry)
            self._account.book("spooled", -len(work.messages))
            self._book(work, stored)

    def _book(self, work: Work, stored: Stored) -> None:
        self._account.book("stored", len(work.translated) - len(stored.refused))
        self._account.book("ignored", sum(work.tally.ignored.values()))
        letters = (*work.dead_letters, *stored.refused)
        for letter in letters:
            self._account.book_dead_letter(letter.stage)
            self._tell(letter)
        self._warn_of_many(len(work.messages), len(letters))
        self._account.book_tally(work.tally)
        self._account.book_rows(stored.rows)
        self._account.book_latencies(list(map(_RECEIVED_US, work.messages)), self._clock_us())

    def _tell(self, letter: DeadLetter) -> None:
        """Log the first dead letter of each kind in a minute: the table has them all."""
        if self._complaint.is_news(f"{letter.stage} {letter.route} {letter.sqlstate}"):
            log.warning(
                "a message became a dead letter",
                topic=letter.message.topic.decode("utf-8", "backslashreplace"),
                stage=letter.stage,
                error=letter.error,
            )

    def _warn_of_many(self, messages: int, letters: int) -> None:
        share = self._share.count(messages, dead_letters=letters)
        if share and share.high:
            log.warning(
                "many messages become dead letters; all others are stored",
                share=str(share),
                dead_letters=share.dead_letters,
                messages=share.messages,
                remedy="`mqtt-bridge dead-letters list --summary` counts them by reason",
            )

    # -- what others ask

    def prove(self, positions: Sequence[int]) -> None:
        """The broker has seen the PUBACKs of these positions."""
        with self._lock:
            self._ledger.prove(positions)

    def take_prunable(self) -> tuple[BatchKey, ...]:
        """Ledger rows that nobody needs any more; the caller deletes them, or gives them back."""
        with self._lock:
            return self._ledger.take_prunable()

    def give_back(self, keys: Sequence[BatchKey]) -> None:
        """These rows could not be deleted."""
        with self._lock:
            self._ledger.give_back(keys)

    @property
    def session_to_raise(self) -> int | None:
        """The session epoch that the database does not know yet, or None."""
        with self._lock:
            return self._ledger.session_to_raise

    def session_raised(self, session_epoch: int) -> None:
        """The database knows this session epoch now."""
        with self._lock:
            self._ledger.session_raised(session_epoch)

    @property
    def holds_replays(self) -> bool:
        """Whether a retained message that the broker replayed is not durable yet."""
        with self._lock:
            held = (self._queue, *self._in_hand.values())
            return any(message.retain for messages in held for message in messages)

    # -- what the watchdog asks: a worker that hangs may hold the lock

    def batches_in_hand(self) -> dict[int, object]:
        """By worker thread that has a batch in hand: something that changes as it gets on with it."""
        return {
            worker: (self._taken[worker], len(messages))
            for worker, messages in self._in_hand.copy().items()
            if messages
        }

    @property
    def taken(self) -> int:
        """How many batches were taken so far."""
        return sum(self._taken.copy().values())

    @property
    def waits_for_a_free_worker(self) -> bool:
        """Whether there is something in the queue, and a worker that has nothing in hand: for a moment only."""
        return bool(self._queue) and len(self.batches_in_hand()) < self._limits.workers

    def holds(self, position: int, timeout_s: float = 0.5) -> bool:
        """Whether a delivery is queued or in hand; also True where the lock cannot be had, so that nobody can tell."""
        if not self._lock.acquire(timeout=timeout_s):
            return True
        try:
            held = (*self._in_hand.values(), self._queue)
            return any(message.position == position and message.qos for messages in held for message in messages)
        finally:
            self._lock.release()

    def balance(self) -> Balance:
        """The account of messages at this moment."""
        with self._lock:
            in_hand = [messages for messages in self._in_hand.values() if messages]
            heads = [messages[0].received_us for messages in in_hand]
            if self._queue:
                heads.append(self._queue[0].received_us)
            return self._account.balance(
                in_flight=len(self._queue) + sum(map(len, in_hand)),
                queue_depth=len(self._queue),
                queue_bytes=self._held_bytes,
                oldest_us=min(heads, default=None),
            )
