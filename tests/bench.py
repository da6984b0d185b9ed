"""A bridge that is built and does not run: its sink is given batches, its readiness is asked, an observer looks on.

    with Bench(tmp_path, dsn, observed_by=superusers_dsn) as bench:
        outcome = bench.store([1, 2, 3])        # in a thread of its own, as a worker does
        bench.failed("42P01")                   # waits for a try that ended so

What is stored goes the way of every batch: `Sink.store`, with its verdicts, delays and retries.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import psycopg2
import tenacity

from mqtt_bridge.bridge import Bridge
from mqtt_bridge.errors import Failure, Fenced
from mqtt_bridge.ledger import BatchKey, Entry, fingerprint
from mqtt_bridge.model import READINGS_COLUMNS, Message, Table, Translation
from mqtt_bridge.settings import load
from mqtt_bridge.sink import Stopped
from mqtt_bridge.transactions import Batch, Stored, Translated
from tests.waiting import wait_until

LONG_AGO_US = 1_000_000_000_000_000
"""2001-09-09, microseconds: every row is in the default partition, whatever the calendar says."""
READINGS = Table("readings", READINGS_COLUMNS)

Outcome = list[Stored | Exception]
"""What came of a batch that is stored beside the test; empty for as long as it is tried."""


class Bench:
    """See the module. `dsn` is read again for every new connection and may be changed at any time."""

    def __init__(self, directory: Path, dsn: str, *, observed_by: str, **settings: object) -> None:
        self._dsn_file = directory / "dsn"
        self.dsn = dsn
        environ = {"DATABASE_URL_FILE": self._dsn_file, "DB_POOL_SIZE": 2, "HTTP_PORT": 0} | settings
        self.bridge = Bridge(load({name: str(value) for name, value in environ.items()}, env_file=None))
        self.sink = self.bridge._sink
        self.failures: list[Failure] = []
        """What every try that failed was understood as, in order."""
        self._note_failures()
        self._observed_by = observed_by
        self.observe_again()
        self._numbers = itertools.count(1)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sink.stop()
        for thread in self._threads:
            thread.join(timeout=20)
        self.bridge._connections.close()
        self._observer.close()
        assert not any(thread.is_alive() for thread in self._threads), "a try hangs in the database"

    def _note_failures(self) -> None:
        after_attempt = self.sink._after_attempt

        def note(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            self.failures.append(error.failure)  # type: ignore[union-attr]
            after_attempt(state)

        self.sink._after_attempt = note  # type: ignore[method-assign]

    @property
    def dsn(self) -> str:
        """Where the sink connects to."""
        return self._dsn_file.read_text()

    @dsn.setter
    def dsn(self, dsn: str) -> None:
        self._dsn_file.write_text(dsn)

    def open(self) -> Self:
        """Make the tables, own the client id, and store a first batch, so that all connections have been used."""
        self.claim = self.sink.open(create=True)
        assert self.sink.store(self.batch([0])) == Stored({"readings": 1})
        self.sql("DELETE FROM readings; DELETE FROM mqtt_bridge.ledger")
        return self

    # -- storing

    def batch(self, numbers: Iterable[int], *others: Translated) -> Batch:
        """A batch of good readings with these values, and of others; its key is new."""
        translated = sorted([*map(reading, numbers), *others], key=lambda one: one[0].position)
        marks = b"".join(message.fingerprint for message, _ in translated)
        key = BatchKey(self.claim.owner_epoch, next(self._numbers))
        return Batch(Entry(key, self.claim.session_epoch, translated[0][0].position, marks), translated, [])

    def store(self, numbers: Iterable[int], *others: Translated) -> Outcome:
        """Store such a batch in a thread of its own."""
        return self.store_batch(self.batch(numbers, *others))

    def store_batch(self, batch: Batch) -> Outcome:
        """The same for a batch that was made before."""
        outcome: Outcome = []

        def store() -> None:
            try:
                outcome.append(self.sink.store(batch))
            except (Stopped, Fenced) as error:
                outcome.append(error)

        self._threads.append(threading.Thread(target=store, name="test-store"))
        self._threads[-1].start()
        return outcome

    # -- what is seen of it

    def failed(self, sqlstate: str | None = None, *, saying: str = "") -> Failure:
        """Wait for a try that ended with this code (or this sentence); what it was understood as."""

        def found() -> Failure | None:
            said = [failure for failure in list(self.failures) if saying in failure.sentence]
            return next((failure for failure in said if failure.sqlstate == sqlstate), None)

        return wait_until(found, timeout_s=30, what=f"{sqlstate or saying} among {self.failures}")

    @property
    def reasons(self) -> str:
        """What `/readyz` would say, as one text."""
        return "\n".join(self.bridge.status()["reasons"])

    @property
    def state(self) -> str:
        """What `/api/status` would say."""
        return str(self.bridge.status()["state"])

    def assert_stored_once(self, outcome: Outcome, numbers: Sequence[int]) -> None:
        """The batch of these numbers, and nothing else, is stored, once; no dead letter; all is well again."""
        wait_until(lambda: outcome, timeout_s=60, what="the batch to be stored")
        assert outcome == [Stored({"readings": len(numbers)})]
        assert self.values() == list(numbers)
        assert self.letters() == []
        assert self.sql("SELECT count(*) FROM mqtt_bridge.ledger") == [(1,)]
        assert self.sink.trouble is None
        assert self.state != "paused"

    # -- the observer

    def observe_again(self, dsn: str | None = None) -> None:
        """Connect the observer, after its session was ended, or to another server."""
        self._observer = psycopg2.connect(dsn or self._observed_by, application_name="observer")
        self._observer.autocommit = True

    def sql(self, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
        """Rows of a statement of the observer."""
        with self._observer.cursor() as cursor:
            cursor.execute(statement, arguments or None)
            return cursor.fetchall() if cursor.description else []

    def values(self) -> list[float]:
        """Every value that is stored."""
        return [value for (value,) in self.sql("SELECT value FROM readings ORDER BY value")]

    def letters(self) -> list[tuple[str, str, str | None]]:
        """Every dead letter, as (payload, stage, SQLSTATE)."""
        return self.sql(
            "SELECT convert_from(payload, 'UTF8'), stage, sqlstate FROM mqtt_bridge.dead_letters ORDER BY id"
        )

    def backends(self) -> list[int]:
        """The process ids of all sessions in this database but the observer's."""
        found = self.sql(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return [pid for (pid,) in found]

    def end_sessions(self) -> None:
        """End all sessions in this database but the observer's."""
        for pid in self.backends():
            self.sql("SELECT pg_terminate_backend(%s, 10000)", pid)

    def wait_until_blocked(self) -> None:
        """Until a session of the server waits for a lock."""
        wait_until(lambda: self.sql("SELECT 1 FROM pg_locks WHERE NOT granted"), what="the batch to wait for a lock")


def reading(
    number: int, *, device: str = "d", value: float | None = None, text: str | None = None, qos: int = 1
) -> Translated:
    """A message whose payload is its number, and one row with the number as value, unless told otherwise."""
    value = float(number) if value is None and text is None else value
    topic, payload = b"devices/d", str(number).encode()
    mark = fingerprint(topic, payload, retain=False)
    message = Message(topic, payload, qos, False, LONG_AGO_US, position=number, fingerprint=mark)
    return message, Translation("default", READINGS, [(LONG_AGO_US, device, "m", value, text)])
