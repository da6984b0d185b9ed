"""Keeps a connection to the broker: connects, receives, reconnects, and leaves in good order.

One thread, `mqtt-bridge-network`, does all reading and writing. It never touches PostgreSQL, and it survives
everything: whatever a connection raises ends that connection only, and the next one is tried with growing, jittered
delays. While the queue is full it stops reading, for at most half a keepalive; then it disconnects and comes back
when there is room, and the broker's session keeps the rest.

A second client with the same id takes the session over, and would be cut off in turn: a war that nobody wins. Whoever
is cut off asks its database at once whether the client id is still its own (`on_cut`); where that cannot tell, the
third cut in a row makes it wait for long, and say so.

Leaving: the pipeline is drained first, then `leave` waits until the broker is known to have seen every PUBACK. Closing
a socket with unread data makes the kernel send RST, and a broker then forgets acknowledgements that it has received.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from mqtt_bridge.acks import AckTracker
from mqtt_bridge.broker_connection import BrokerConnection
from mqtt_bridge.broker_connection import Inbox as ConnectionInbox
from mqtt_bridge.broker_limits import DropWatch
from mqtt_bridge.complaints import Complaint
from mqtt_bridge.errors import SettingsError, explain_hangup, explain_unreachable
from mqtt_bridge.retained import Retained
from mqtt_bridge.settings import Settings

log = structlog.get_logger(__name__)

FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 30.0
SETTLE_UP_S = 30.0
"""Longest that a connection is given to be ended in order, however long the keepalive is."""
TICK_S = 0.25
"""How long the thread sleeps at most while nothing arrives: barriers and timeouts are looked after this often."""
STEADY_S = 5.0
"""A connection that lasted this long was a good one: the next delay starts small again."""
NOT_CONNECTED = "not connected yet"
CONTESTED_CUTS = 3
"""So many connections in a row that did not last: somebody else wants this client id, and takes it each time."""


class Inbox(ConnectionInbox, Protocol):
    """What the subscriber needs of the pipeline beside what each connection needs."""

    @property
    def full(self) -> bool:
        """Whether the bound on held messages is reached."""

    def wait_for_room(self, timeout_s: float) -> bool:
        """Whether there is room again within `timeout_s`."""

    def wait_until_settled(self, timeout_s: float) -> None:
        """Until something more is settled, at most `timeout_s`."""


@dataclass(frozen=True, slots=True)
class BrokerState:
    """What is known of the broker at one moment."""

    connected: bool
    subscribed: bool
    session_present: bool
    reconnects: int
    dropped: int | None
    """Messages that the broker says it has dropped since its start, of any client; None where that is not known."""
    problem: str | None
    """Why it is not connected or not subscribed, with the setting to change; None while all is well."""


class Subscriber:
    """Receives the messages of `filters` into `inbox`."""

    def __init__(
        self,
        settings: Settings,
        *,
        filters: Sequence[str],
        inbox: Inbox,
        acks: AckTracker,
        retained: Retained | None = None,
        on_cut: Callable[[], object] = lambda: None,
        unwanted: frozenset[str] = frozenset(),
        drops: DropWatch | None = None,
    ) -> None:
        """`retained` follows the replays of the filters; without it each connection begins anew.

        `on_cut` is called when the broker has ended a connection; it must not block. `unwanted` as in
        `BrokerConnection`.
        """
        self._settings = settings
        self._filters = filters
        self._inbox = inbox
        self._acks = acks
        self._retained = retained
        self._on_cut = on_cut
        self._unwanted = unwanted
        self._drops = drops or DropWatch(filters)
        self._complaint = Complaint()
        self._short_lived = 0  # connections in a row that did not last
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._leaving = threading.Event()
        self._closed_in = threading.Event()  # nothing of QoS 1 is taken in any more
        self._gone = threading.Event()  # the connection was left in good order
        self._renew = threading.Event()  # the connection shall be ended, for the broker to deliver again
        # Written by the network thread alone, read by others:
        self._connection: BrokerConnection | None = None
        self._problem: str | None = NOT_CONNECTED
        self._connects = 0
        self.subscriptions: frozenset[str] = frozenset()
        """Filters that the session at the broker is known to have; set from the database before `start`."""
        self._confirmed = False
        self.turns = 0
        """Rounds of the network thread's loop: they go on as long as it does."""
        self.connecting = False
        """Whether it is about to connect: a round that may take as long as name servers and handshakes do."""

    # -- for other threads

    def start(self) -> None:
        """Start the network thread. Idempotent."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mqtt-bridge-network", daemon=True)
            self._thread.start()

    def stop_taking_in(self) -> None:
        """From now on QoS 1 messages are left to the broker; what was received goes on being acknowledged.

        Returns when the network thread has heard of it: what the pipeline holds then is all that is to be drained.
        """
        self._leaving.set()
        if self.alive:
            self._closed_in.wait(2 * TICK_S)

    def leave(self, timeout_s: float) -> bool:
        """Have every acknowledgement proven, and disconnect. False when that could not be done in time.

        Call it when the pipeline is empty: what is acknowledged later is not waited for.
        """
        self.stop_taking_in()
        if self._connection is None:
            return True
        self._stop.set()
        return self._gone.wait(timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread. Idempotent, safe when never started."""
        self._leaving.set()
        self._stop.set()
        self._gone.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(max(0.5, timeout_s))

    def reconnect(self) -> None:
        """End the connection: what is unacknowledged is delivered again on the next one, and matched anew."""
        self._renew.set()

    @property
    def alive(self) -> bool:
        """Whether the network thread runs, as it should from `start` to `stop`."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def state(self) -> BrokerState:
        """What is known of the broker now."""
        connection = self._connection
        return BrokerState(
            connected=connection is not None and connection.connected,
            subscribed=connection is not None and connection.subscribed,
            session_present=connection is not None and connection.session_present,
            reconnects=max(0, self._connects - 1),
            dropped=self._drops.dropped,
            problem=(connection.problem if connection is not None else None) or self._problem,
        )

    # -- the network thread

    def _run(self) -> None:
        delay_s = FIRST_DELAY_S
        while not self._stop.is_set() and not self._leaving.is_set():
            began_s, on_purpose = time.monotonic(), False
            self.turns += 1
            try:
                on_purpose = self._connect_and_receive()
            except Exception:  # the thread must survive: a connection ends, the next one begins
                log.exception("the connection to the broker ended with an unforeseen error")
                self._problem = "the connection to the broker ended with an unforeseen error, see the log."
            if on_purpose or time.monotonic() - began_s > STEADY_S:
                delay_s = FIRST_DELAY_S
            if on_purpose:
                continue
            if self._contested:
                delay_s = LONGEST_DELAY_S
            self._stop.wait(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)
        self._closed_in.set()
        self._gone.set()

    def _connect_and_receive(self) -> bool:
        """One connection, from the first try to its end. True when it came to be, and was ended on purpose."""
        self.connecting = True
        try:
            connection = self._open()
        finally:
            self.connecting = False
        return connection is not None and self._live(connection)

    def _open(self) -> BrokerConnection | None:
        try:
            connection = BrokerConnection(
                self._settings,
                filters=self._filters,
                inbox=self._inbox,
                acks=self._acks,
                retained=self._retained,
                subscriptions=self.subscriptions,
                confirmed=self._confirmed,
                unwanted=self._unwanted,
                drops=self._drops,
            )
        except SettingsError as error:  # a secret or a TLS file has become unreadable
            self._complain(str(error))
            return None
        try:
            connection.open()
        except (OSError, UnicodeError) as error:
            connection.close()
            self._short_lived = 0  # the broker itself was away: nobody has taken anything over
            reason = explain_unreachable(error, host=self._settings.mqtt_host, port=self._settings.mqtt_port)
            self._complain(reason)
            return None
        return connection

    def _live(self, connection: BrokerConnection) -> bool:
        self._renew.clear()
        self._connection = connection
        try:
            on_purpose = self._receive(connection)
        finally:
            self._connection = None
            self.subscriptions, self._confirmed = connection.subscriptions, connection.confirmed
            connection.close()
            if connection.age_s is not None:
                self._on_cut()
        if not on_purpose:
            self._note_cut(connection)
        return on_purpose

    @property
    def _contested(self) -> bool:
        return self._short_lived >= CONTESTED_CUTS

    def _note_cut(self, connection: BrokerConnection) -> None:
        """The broker, or the network, has ended a connection: was it another client with our id?"""
        if connection.age_s is not None and not connection.garbled:
            self._short_lived = self._short_lived + 1 if connection.age_s < STEADY_S else 0
        if connection.taken_over:
            self._short_lived = CONTESTED_CUTS
        self._complain(self._why_it_ended(connection))

    def _why_it_ended(self, connection: BrokerConnection) -> str:
        settings = self._settings
        if self._contested:
            how = "the session was taken over" if connection.taken_over else "cut off again and again after connecting"
            return (
                f"{how}: another client seems to use the client id {settings.mqtt_client_id!r}."
                " Give every client an id of its own (MQTT_CLIENT_ID)."
            )
        if connection.problem:
            return connection.problem
        if connection.age_s is None:
            return explain_hangup(host=settings.mqtt_host, port=settings.mqtt_port, tls=settings.mqtt_tls)
        return "the connection to the broker is lost; trying again."

    def _receive(self, connection: BrokerConnection) -> bool:
        """Until the connection ends; True when it was ended on purpose."""
        was_connected = was_subscribed = False
        while not self._gone.is_set() and self._step(connection):
            if connection.connected and not was_connected:
                was_connected = True
                self._connects += 1
                self._problem = None if self._problem == NOT_CONNECTED else self._problem
            if connection.subscribed and not was_subscribed:
                was_subscribed = True
                self._note_subscribed(connection)
            if connection.connected:
                self.subscriptions = connection.subscriptions
            if self._contested and (connection.age_s or 0.0) >= STEADY_S:
                self._short_lived = 0
            if connection.problem:
                self._complain(connection.problem)
            if self._leaving.is_set() and self._leave(connection):
                return True
            if self._inbox.full and not self._wait_for_room(connection):
                return True
            if connection.out_of_reach:
                # Its answer to the barrier is queued behind a backlog larger than it was allowed to send.
                log.info("reconnecting, to have the broker account for its backlog", unproven=self._acks.unproven)
                self._settle_up(connection)
                return True
            if self._renew.is_set():
                log.info("reconnecting, to have the broker deliver again what is unacknowledged")
                return True
        return False

    def _step(self, connection: BrokerConnection) -> bool:
        self.turns += 1
        if self._leaving.is_set():
            connection.stop_taking_in()
            self._closed_in.set()
        return connection.step(TICK_S)

    def _note_subscribed(self, connection: BrokerConnection) -> None:
        self._problem = None
        self._complaint.clear()
        log.info(
            "subscribed",
            broker=f"{self._settings.mqtt_host}:{self._settings.mqtt_port}",
            client_id=self._settings.mqtt_client_id,
            filters=list(self._filters),
            session_present=connection.session_present,
        )

    def _complain(self, reason: str) -> None:
        self._problem = reason
        if not self._stop.is_set() and self._complaint.is_news(reason):
            log.warning(f"MQTT: {reason}")

    # -- leaving

    def _leave(self, connection: BrokerConnection) -> bool:
        """Whether the connection was left: once asked to, and once every PUBACK is known to have been seen."""
        if not self._stop.is_set() or not connection.settled:
            return False
        connection.leave()
        deadline_s = time.monotonic() + 2.0
        while connection.step(TICK_S) and time.monotonic() < deadline_s:
            pass
        self._gone.set()
        return True

    # -- accounting

    def _settle_up(self, connection: BrokerConnection) -> None:
        """Have all that was taken in acknowledged, and all acknowledgements read, before the connection is ended.

        Else the broker would deliver tens of thousands of messages again, over and over, and nothing would get on.
        """
        connection.stop_taking_in()
        # Mosquitto reads one packet of a client at a time, and may send thousands of messages for each of them.
        deadline_s = time.monotonic() + min(self._settings.mqtt_keepalive_s / 2, SETTLE_UP_S)
        while self._acks.unacknowledged and time.monotonic() < deadline_s and not self._stop.is_set():
            self.turns += 1
            self._inbox.wait_until_settled(0.05)
            if not connection.step_without_reading():
                return
        connection.part(max(0.0, deadline_s - time.monotonic()), pause=self._pause)

    def _pause(self, seconds: float) -> bool:
        """Wait, and be seen to be alive; True when there is no time for it any more."""
        self.turns += 1
        return self._stop.wait(seconds)

    # -- backpressure

    def _wait_for_room(self, connection: BrokerConnection) -> bool:
        """Stop reading until there is room; False when that took too long, or the bridge stops: no sign of a rival.

        Half a keepalive is safe: the broker hears PINGREQ and PUBACKs all the while.
        """
        deadline_s = time.monotonic() + self._settings.mqtt_keepalive_s / 2
        while not self._inbox.wait_for_room(0.05):
            self.turns += 1
            if self._stop.is_set() or not connection.step_without_reading():
                return not self._stop.is_set()
            if time.monotonic() > deadline_s:
                connection.problem = "the queue is full; disconnected until there is room, the broker keeps the rest."
                self._until_there_is_room(connection)
                return False
        return True

    def _until_there_is_room(self, connection: BrokerConnection) -> None:
        self._complain(connection.problem or "")
        connection.close()
        while not self._stop.is_set() and not self._leaving.is_set() and not self._inbox.wait_for_room(1.0):
            self.turns += 1
