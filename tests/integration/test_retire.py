"""How a client id is retired, step by step: against a scripted broker, and PostgreSQL as it is."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import psycopg2
import pytest

from mqtt_bridge import ownership, schema
from mqtt_bridge.connections import BridgeConnection
from mqtt_bridge.errors import BridgeError, Fenced
from mqtt_bridge.ledger import BatchKey, Entry
from mqtt_bridge.settings import Settings
from mqtt_bridge.tools import retire as retiring
from mqtt_bridge.tools.embedded import free_port
from mqtt_bridge.tools.retire import Interrupted, Retirement, Summary, _Watch, render
from mqtt_bridge.transactions import begin
from tests.scripted_broker import SUBSCRIBE, Answer, ScriptedBroker
from tests.waiting import wait_until

TOPIC = b"devices/d1/telemetry"


@pytest.fixture
def client_id() -> str:
    return f"retired-{secrets.token_hex(4)}"


@pytest.fixture
def connection(database: str) -> Iterator[BridgeConnection]:
    with closing(psycopg2.connect(database, connection_factory=BridgeConnection)) as connection:
        schema.apply(connection)
        yield connection


@pytest.fixture
def scripted() -> Iterator[ScriptedBroker]:
    with ScriptedBroker(answer=Answer(session_present=True)) as broker:
        yield broker


StartRetirement = Callable[..., "Running"]


class Running:
    """A retirement in a thread of its own."""

    def __init__(self, settings: Settings, quiet_s: float) -> None:
        self.said: list[str] = []
        self.waiting_for: list[str] = []
        self.retirement = Retirement(
            settings,
            quiet_s=quiet_s,
            show=lambda progress: self.waiting_for.append(progress.waiting_for),
            say=self.said.append,
        )
        self.summary: Summary | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="retirement", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.summary = self.retirement.run(self.retirement.look_up())
        except BaseException as error:
            self.error = error

    def wait(self) -> Summary:
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        assert self.summary is not None
        return self.summary

    def end(self) -> None:
        self.retirement.request_stop()
        self._thread.join(60)
        self.retirement.close()


@pytest.fixture
def start(database: str, client_id: str) -> Iterator[StartRetirement]:
    running: list[Running] = []

    def begin(port: int, *, quiet_s: float = 0.5, **changes: Any) -> Running:
        settings = Settings(
            mqtt_host="127.0.0.1", mqtt_port=port, mqtt_client_id=client_id, database_url=database, **changes
        )
        running.append(Running(settings, quiet_s))
        return running[-1]

    yield begin
    for each in running:
        each.end()


def known_clients(connection: BridgeConnection) -> list[str]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT client_id FROM mqtt_bridge.owners UNION SELECT client_id FROM mqtt_bridge.ledger")
        return [row[0] for row in cursor.fetchall()]


# --- The broker's side ---


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_it_unsubscribes_from_what_settings_and_database_know_and_subscribes_to_nothing(
    scripted, start, connection, client_id, protocol
):
    claim = ownership.claim(connection, client_id)
    ownership.note_subscriptions(connection, client_id, {"old/+"}, owner_epoch=claim.owner_epoch)

    summary = start(scripted.port, mqtt_protocol=protocol).wait()

    assert scripted.record.unsubscribes[0] == ["devices/+/telemetry", "old/+"]
    assert SUBSCRIBE not in scripted.record.packets
    assert summary.session_found
    assert known_clients(connection) == []


def test_of_a_shared_group_it_unsubscribes_in_the_form_of_the_group(scripted, start):
    start(scripted.port, mqtt_shared_group="bridges").wait()

    assert scripted.record.unsubscribes[0] == ["$share/bridges/devices/+/telemetry"]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_clean_session_ends_the_one_that_is_there(scripted, start, protocol):
    start(scripted.port, mqtt_protocol=protocol).wait()

    draining, ending = scripted.record.connects
    assert (draining.clean_start, ending.clean_start) == (False, True)
    assert draining.client_id == ending.client_id
    assert ending.session_expiry_s == (0 if protocol == "5" else None)


def test_the_session_ends_only_after_a_connection_on_which_nothing_came(scripted, start):
    running = start(scripted.port)
    scripted.wait_for_connect(1)
    scripted.publish(TOPIC, b'{"a": 1}', mid=1)
    scripted.wait_for_connect(2)
    scripted.publish(TOPIC, b'{"a": 2}', mid=2)

    summary = running.wait()

    assert [connect.clean_start for connect in scripted.record.connects] == [False, False, False, True]
    assert scripted.record.pubacks == [1, 2]
    assert summary.messages["stored"] == 2


def test_it_waits_for_the_broker_to_confirm_that_nothing_new_will_come(scripted, start):
    scripted.answer_subscribe = False
    running = start(scripted.port, mqtt_protocol="3.1.1")

    wait_until(lambda: scripted.record.unsubscribes, what="UNSUBSCRIBE")
    wait_until(
        lambda: any("waiting for the broker to confirm" in line for line in running.waiting_for), what="the reason"
    )
    assert len(scripted.record.connects) == 1
    scripted.send_raw(b"\xb0\x02\x00\x01")

    assert running.wait().session_found


def test_a_new_session_is_empty_and_is_ended_at_once(scripted, start, connection):
    scripted.answer = Answer(session_present=False)

    summary = start(scripted.port, quiet_s=3600).wait()

    assert not summary.session_found
    assert [connect.clean_start for connect in scripted.record.connects] == [False, True]
    assert known_clients(connection) == []


def test_a_session_that_cannot_be_ended_now_is_ended_later(scripted, start, connection, client_id, monkeypatch):
    monkeypatch.setattr(retiring, "RETRY_S", 0.05)
    running = start(scripted.port)
    scripted.wait_for_connect(1)

    scripted.answer = Answer(session_present=True, reason=0x88)
    wait_until(lambda: running.said, timeout_s=30, what="the reason")
    assert known_clients(connection) == [client_id]
    scripted.answer = Answer(session_present=True)
    running.wait()

    assert "The session cannot be ended" in running.said[0]
    assert known_clients(connection) == []


def test_a_broker_that_refuses_to_let_go_is_quoted_and_the_session_stays(scripted, start, connection, client_id):
    scripted.answer_subscribe = False
    running = start(scripted.port)
    wait_until(lambda: scripted.record.unsubscribes, what="UNSUBSCRIBE")

    scripted.send_raw(b"\xb0\x04\x00\x01\x00\x87")
    wait_until(lambda: any("refused to unsubscribe" in line for line in running.waiting_for), what="the reason")
    running.end()

    assert isinstance(running.error, Interrupted)
    assert known_clients(connection) == [client_id]


# --- The database's side ---


def test_a_commit_that_was_not_answered_is_found_to_have_happened(connection, client_id):
    claim = ownership.claim(connection, client_id)
    ended: list[str] = []
    for _ in range(2):
        ownership.retire(
            connection, client_id, owner_epoch=claim.owner_epoch, end_session=lambda: ended.append("session")
        )

    # The second time it might already be the session of another.
    assert ended == ["session"]
    assert known_clients(connection) == []


def test_who_was_overtaken_ends_nobodys_session(connection, client_id):
    overtaken = ownership.claim(connection, client_id)
    ownership.claim(connection, client_id)
    ended: list[str] = []

    with pytest.raises(Fenced):
        ownership.retire(
            connection, client_id, owner_epoch=overtaken.owner_epoch, end_session=lambda: ended.append("session")
        )
    connection.rollback()

    assert ended == []
    assert known_clients(connection) == [client_id]


def test_a_spool_that_was_begun_just_before_the_claim_keeps_the_session_and_the_row(connection, client_id):
    claim = ownership.claim(connection, client_id)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE mqtt_bridge.owners SET spool_id = 'disk-7'")
    ended: list[str] = []

    with pytest.raises(ownership.SpoolLeft, match="disk-7"):
        ownership.retire(
            connection, client_id, owner_epoch=claim.owner_epoch, end_session=lambda: ended.append("session")
        )
    connection.rollback()

    assert ended == []
    assert known_clients(connection) == [client_id]


def test_while_the_session_is_being_ended_nobody_can_claim_the_client_id(connection, database, client_id):
    claim = ownership.claim(connection, client_id)
    claimed = threading.Event()

    def claim_too() -> None:
        with closing(psycopg2.connect(database, connection_factory=BridgeConnection)) as other:
            ownership.claim(other, client_id)
        claimed.set()

    newcomer = threading.Thread(target=claim_too)

    def end_session() -> None:
        newcomer.start()
        wait_until(lambda: waiting_for_locks(database) == 1, what="the newcomer to wait")
        assert not claimed.is_set()

    ownership.retire(connection, client_id, owner_epoch=claim.owner_epoch, end_session=end_session)
    newcomer.join(10)

    assert claimed.is_set()
    assert known_clients(connection) == [client_id]


def waiting_for_locks(database: str) -> int:
    with closing(psycopg2.connect(database)) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return int(cursor.fetchone()[0])


def test_no_process_from_before_can_commit_once_the_client_id_is_in_use_again(connection, client_id):
    before = ownership.claim(connection, client_id)
    ownership.retire(connection, client_id, owner_epoch=before.owner_epoch, end_session=lambda: None)
    ownership.claim(connection, client_id)

    stale = Entry(BatchKey(before.owner_epoch, 1), before.session_epoch, 1, b"12345678")
    with connection.cursor() as cursor:
        cursor.execute(begin(30.0))
        with pytest.raises(psycopg2.errors.NotNullViolation):
            cursor.execute(ownership.statements(client_id, stale, owner_epoch=before.owner_epoch))


def test_a_database_without_tables_knows_nobody(database):
    with closing(psycopg2.connect(database, connection_factory=BridgeConnection)) as connection:
        assert ownership.look_up(connection, "anybody") is None


def test_a_spool_is_a_reason_to_refuse_before_anything_is_claimed(connection, start, client_id):
    claim = ownership.claim(connection, client_id)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE mqtt_bridge.owners SET spool_id = 'disk-7'")

    with pytest.raises(BridgeError, match="disk-7"):
        start(free_port()).wait()

    ownership.check_owner(connection, client_id, owner_epoch=claim.owner_epoch)


# --- When is it quiet? ---


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def seen(*, received: int = 0, in_flight: int = 0, unproven: int = 0, reconnects: int = 0, **changes: Any) -> Any:
    return SimpleNamespace(
        status={
            "broker": {"session_present": changes.get("present", True), "reconnects": reconnects},
            "spool": {"messages": changes.get("spooled", 0)},
        },
        balance=SimpleNamespace(received=received, in_flight=in_flight),
        unproven_acks=unproven,
        ready=changes.get("ready", True),
    )


@pytest.mark.parametrize(
    ("busy", "after"),
    [
        ({"received": 8}, {"received": 8}),
        ({"reconnects": 1}, {"reconnects": 1}),
        ({"in_flight": 1}, {}),
        ({"spooled": 1}, {}),
        ({"unproven": 1}, {}),
        ({"ready": False}, {}),
    ],
)
def test_whatever_moves_begins_the_quiet_time_anew(busy, after):
    clock = Clock()
    watch = _Watch(5.0, clock)
    watch.look(seen())

    clock.now_s += 4.9
    watch.look(seen(**busy))
    clock.now_s += 4.9
    watch.look(seen(**after))
    assert not watch.done
    clock.now_s += 0.2
    watch.look(seen(**after))

    assert watch.done


def test_a_new_session_needs_no_quiet_time_but_what_was_received_has_to_be_settled():
    watch = _Watch(5.0, Clock())

    watch.look(seen(present=True))
    watch.look(seen(present=False, in_flight=1))
    assert not watch.done
    watch.look(seen(present=False))

    assert (watch.done, watch.session_gone, watch.session_found) == (True, True, True)


def test_messages_that_never_end_are_remarked_on_once():
    clock = Clock()
    watch = _Watch(5.0, clock)
    remarks = 0

    for second in range(200):
        clock.now_s += 1.0
        watch.look(seen(received=second))
        remarks += watch.goes_on_and_on()

    assert remarks == 1
    assert not watch.done


def test_an_outage_is_not_taken_for_messages_that_never_end():
    clock = Clock()
    watch = _Watch(5.0, clock)
    watch.look(seen(received=1))

    for _ in range(200):
        clock.now_s += 1.0
        watch.look(seen(received=1, ready=False))

        assert not watch.goes_on_and_on()


# --- For people ---


def test_the_summary_names_what_became_of_the_messages():
    messages = {"stored": 4990, "duplicate": 10, "dead_lettered": 0}
    summary = Summary(known=None, session_found=True, messages=messages, ledger_rows=0, seconds=6.21)

    assert render("hall-7", summary) == (
        "'hall-7' is retired: its session held 5,000 messages (4,990 stored, 10 duplicate); 6.2 s"
    )
