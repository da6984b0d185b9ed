"""One connection to the broker, from CONNECT to its end.

Every connection is a new object with a paho client of its own. That is what gates acknowledgements: a PUBACK that
comes too late goes to a client whose socket is closed, never before the CONNECT of the next connection and never to a
message of the next session that happens to have the same packet id.

paho's own thread and its reconnecting are not used: its thread dies of any exception while the socket stays open, it
cannot stop reading, and it falls back to MQTT 3.1 silently. The subscriber's thread calls `step` instead.

Threads: everything runs in the subscriber's thread, but for `acknowledge`, which the workers call: it only appends to
paho's output queue and wakes the loop. Registering a write callback keeps paho from writing in the calling thread.
"""

from __future__ import annotations

import functools
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import paho.mqtt.client as mqtt
import structlog
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from mqtt_bridge.acks import AckTracker, SendAcks
from mqtt_bridge.broker_limits import DropWatch, shortfalls
from mqtt_bridge.errors import Problem, SettingsError, explain_refusal
from mqtt_bridge.fast_client import FastClient, why_unfit
from mqtt_bridge.ledger import REACH
from mqtt_bridge.model import Run
from mqtt_bridge.publish_packet import MalformedPublish
from mqtt_bridge.retained import Retained
from mqtt_bridge.settings import Settings
from mqtt_bridge.stock_client import StockClient

log = structlog.get_logger(__name__)

BARRIER = "mqtt-bridge/barrier"
"""A filter that nobody uses: unsubscribing from it changes nothing, and is answered."""
BARRIER_EVERY_S = 1.0
BARRIER_EVERY_ACKS = 2_048
"""Without waiting for the last answer, which is queued behind as much as the broker has sent: what is unproven grows by
no more than that, and this."""
LITTLE_BYTES = 8_192
PART_PAUSE_S = 0.1
SESSION_WAIT_S = 5.0
"""How long SUBSCRIBE waits for the database to learn that the session was lost."""
SESSION_TAKEN_OVER = 0x8E
"""Reason of DISCONNECT (MQTT 5, section 3.14.2.1)."""
RESUBSCRIBE_S = 30.0
"""A refused subscription is tried again after this time."""


class Inbox(Protocol):
    """Where received messages go: the pipeline."""

    def connected(self, *, session_present: bool, send_acks: SendAcks) -> None:
        """A connection begins."""

    def disconnected(self) -> None:
        """It has ended."""

    def receive(self, run: Run) -> None:
        """Take messages in, without blocking."""

    def prove(self, positions: Sequence[int]) -> None:
        """The broker has seen these PUBACKs."""

    @property
    def session_to_raise(self) -> int | None:
        """A lost session that the database does not know of yet."""

    @property
    def rest_s(self) -> float:
        """How long to rest after a read that brought little; 0 unless it is busy."""


class _Barrier(NamedTuple):
    """An UNSUBSCRIBE under way."""

    packet_id: int
    mark: int
    """Of the acknowledgements that were sent before it."""
    probes: bool
    """Whether its answer tells if replays of retained messages are over."""


class BrokerConnection:
    """Receives messages into `inbox` until the connection ends, and carries the acknowledgements back."""

    def __init__(
        self,
        settings: Settings,
        *,
        filters: Sequence[str],
        inbox: Inbox,
        acks: AckTracker,
        retained: Retained | None = None,
        subscriptions: frozenset[str] = frozenset(),
        confirmed: bool = False,
        lasting: bool = True,
        unwanted: frozenset[str] = frozenset(),
        drops: DropWatch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`subscriptions`: the filters that the broker's session is known to have, where it is still there;
        `confirmed`: this very process has seen the SUBACK, so that they can be relied upon.

        `retained` follows the replays of the filters from connection to connection.

        `lasting`: the broker keeps the session when the connection ends, as the bridge needs it. Else it begins with
        a clean session, and takes it away with it.

        `unwanted`: filters to unsubscribe from however little the session is known to have them. Without any `filters`
        the connection counts as subscribed once the broker has confirmed that.
        """
        self._settings = settings
        self._filters = filters
        self._inbox = inbox
        self._acks = acks
        self._wire_filters = wire_filters(settings, filters)
        self._wanted = frozenset(self._wire_filters)
        self.subscriptions = subscriptions
        """The filters that the broker's session is known to have."""
        self.confirmed = confirmed
        """Whether this process has seen a SUBACK for all it wants, in the present session."""
        self._unwanted = unwanted
        self._lasting = lasting
        self._drops = drops or DropWatch(filters, asks=False)
        self._clock = clock
        self._is_v5 = settings.mqtt_protocol == "5"
        self._retained = retained or Retained.of(settings, filters)
        self._client = self._make_client()
        self.taken_over = False
        """Whether the broker said that another client with the same id has come."""
        self.garbled = False
        """Whether the broker has sent what cannot be read: that ends a connection, and is no sign of another client."""
        self._connected_s: float | None = None
        self._subscribe_at_s: float | None = None  # not before this; None when it is done
        self._suback_for: int | None = None
        self._unsuback_for: int | None = None
        self._barriers: deque[_Barrier] = deque()  # under way; the broker answers in order
        self._proven = 0  # mark of the last one that was answered
        self._barrier_s = clock()
        self._takes_in = True
        self._overrun = False  # the broker has sent more than the ledger could recognise again
        self._parting = False
        self.connected = False
        """Whether the broker has accepted the connection, and it has not ended."""
        self.subscribed = False
        self.session_present = False
        self.granted: Any = None
        """The properties of CONNACK; None over MQTT 3.1.1."""
        self.problem: str | None = None
        """Why the broker refused, or ended, the connection or the subscription."""

    # -- making it

    def _make_client(self) -> FastClient | StockClient:
        settings = self._settings
        protocol = MQTTProtocolVersion.MQTTv5 if self._is_v5 else MQTTProtocolVersion.MQTTv311
        client = client_class(settings)(
            self._on_run,
            self._on_malformed,
            CallbackAPIVersion.VERSION2,
            client_id=settings.mqtt_client_id,
            clean_session=None if self._is_v5 else not self._lasting,
            protocol=protocol,
            transport=settings.mqtt_transport,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        prepare_client(client, settings)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_unsubscribe
        client.on_socket_register_write = _leave_writing_to_the_loop
        return client

    def open(self) -> None:
        """Connect the socket and send CONNECT. OSError where the broker cannot be reached."""
        self._client.connect(
            self._settings.mqtt_host,
            self._settings.mqtt_port,
            keepalive=self._settings.mqtt_keepalive_s,
            properties=self._connect_properties(),
            **({"clean_start": not self._lasting} if self._is_v5 else {}),  # type: ignore[arg-type]
        )

    def _connect_properties(self) -> Properties | None:
        if not self._is_v5:
            return None
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self._settings.mqtt_session_expiry_s if self._lasting else 0
        properties.ReceiveMaximum = self._settings.mqtt_receive_maximum
        return properties

    # -- living

    def step(self, timeout_s: float) -> bool:
        """Read and write what is there, waiting `timeout_s` for it; False when the connection has ended."""
        rc = self._client.loop(timeout_s)
        if 0 < self._client.take_received() < LITTLE_BYTES and (rest_s := self._inbox.rest_s):
            time.sleep(rest_s)  # for more to come together
        if rc == MQTTErrorCode.MQTT_ERR_PROTOCOL and self._connected_s is not None and self.problem is None:
            self._on_malformed(MalformedPublish("a packet that paho-mqtt does not accept"))
        if rc != MQTTErrorCode.MQTT_ERR_SUCCESS or self.garbled:
            return False
        return self._tend()

    def step_without_reading(self) -> bool:
        """Write acknowledgements and keep the connection alive, but take nothing in: the queue is full."""
        ended = self._client.loop_write() or self._client.loop_misc()
        return not ended and self._client.socket() is not None

    def _tend(self) -> bool:
        if self.connected:
            self._subscribe_when_due()
            self._send_barrier_when_due()
        if self.subscribed and self._takes_in:
            self._drops.tend(self._client.subscribe)
        return self._client.socket() is not None

    @property
    def age_s(self) -> float | None:
        """Time since the broker accepted the connection; None when it has not."""
        return None if self._connected_s is None else self._clock() - self._connected_s

    def acknowledge(self, packet_ids: Sequence[int]) -> None:
        """Queue PUBACKs. Called under the lock of `acks`, by whichever thread has settled the messages."""
        self._client.acknowledge(packet_ids)

    def stop_taking_in(self) -> None:
        """From now on QoS 1 messages are left to the broker: neither stored nor acknowledged."""
        self._takes_in = False

    @property
    def out_of_reach(self) -> bool:
        """Whether the broker has sent so much without accounting for it that no more may be taken in: end it."""
        return self._overrun or self._acks.outstanding >= REACH

    @property
    def settled(self) -> bool:
        """Whether the broker is known to have seen every acknowledgement that was sent."""
        return not self._acks.unproven

    def part(self, timeout_s: float, *, pause: Callable[[float], bool]) -> None:
        """Say goodbye, and wait for the broker to hang up, at most `timeout_s`: it then has read what was sent.

        `pause` waits for so long, and may say that there is no time for more.

        Cut off with unread data in the socket, it would forget every acknowledgement that it has not read yet. What
        it goes on sending is not taken in, and looked at now and then only: a broker that cannot write has the more
        time to read.
        """
        self._parting = True
        self._client.part()
        deadline_s = self._clock() + timeout_s
        ended = self._client.loop_write()
        while not ended and self._client.socket() is not None and self._clock() < deadline_s:
            if pause(PART_PAUSE_S):
                return
            ended = self._client.loop_read() or self._client.loop_write()

    def leave(self) -> None:
        """Send DISCONNECT; the session stays at the broker."""
        self._client.disconnect()

    def close(self) -> None:
        """Give the socket back, however the connection ended. Idempotent."""
        self._drops.ended(cut=False)
        self._ended()
        # Private, and what paho does when the client is collected: here that would be at some time in the future.
        self._client._reset_sockets()

    def _ended(self) -> None:
        self.connected = self.subscribed = False
        self._inbox.disconnected()

    # -- paho's callbacks

    def _on_connect(
        self, _c: object, _u: object, flags: mqtt.ConnectFlags, reason: ReasonCode, properties: Any
    ) -> None:
        if self._connected_s is not None:  # acknowledgements would be counted anew, beneath the barriers under way
            self._on_malformed(MalformedPublish("a second CONNACK"))
            return
        if reason.is_failure:
            self.problem = explain_refusal(str(reason))
            return
        self.connected = True
        self.session_present = flags.session_present
        if not flags.session_present:
            self.subscriptions = frozenset()
            self.confirmed = False
        self._inbox.connected(session_present=flags.session_present, send_acks=self.acknowledge)
        self._retained.connected(session_present=flags.session_present)
        self._connected_s = self._subscribe_at_s = self._clock()
        # The session has its subscriptions; the SUBACK of this connection may be queued behind a long backlog.
        self.subscribed = self.confirmed and bool(self._wanted)
        self._compare_grants(properties)

    def _compare_grants(self, properties: Any) -> None:
        """Warn where the broker grants less than the promises of the bridge need."""
        self.granted = properties
        for shortfall in shortfalls(self._settings, self._filters, properties) if self._lasting else ():
            log.warning(shortfall.sentence, remedy=shortfall.remedy, **shortfall.figures)

    def _on_disconnect(self, _c: object, _u: object, flags: mqtt.DisconnectFlags, reason: ReasonCode, _p: Any) -> None:
        if self.problem is None and flags.is_disconnect_packet_from_server:
            self.problem = f"the broker ended the connection: {reason}."
            self.taken_over = reason.value == SESSION_TAKEN_OVER
        self._drops.ended(cut=not self._parting)
        self._ended()

    def _on_run(self, run: Run) -> None:
        if not self.connected:  # nobody knows yet of which session it is
            self._on_malformed(MalformedPublish("a message before it accepted the connection"))
            return
        for part in self._drops.sift(run):
            if part.qos == 0:
                self._inbox.receive(part)
            elif self._takes_in and not self._overrun:
                # What would be out of the ledger's reach is left to the broker, and all that comes after it.
                self._overrun = self._acks.outstanding + len(part.topics) > REACH
                if not self._overrun:
                    self._inbox.receive(part)

    def _on_malformed(self, error: MalformedPublish) -> None:
        self.problem = f"the broker sent {error}; disconnected."
        self.garbled = True

    # -- subscribing

    def _subscribe_when_due(self) -> None:
        if self._subscribe_at_s is None or self._clock() < self._subscribe_at_s:
            return
        if self._inbox.session_to_raise is None or (self.age_s or 0.0) >= SESSION_WAIT_S:
            self._subscribe_at_s = None
            self._subscribe()

    def _subscribe(self) -> None:
        """SUBSCRIBE on every connect; over MQTT 3.1.1, where that brings the retained messages, once in a process.

        Not on the word of the database alone: a process may have died between a CONNECT that began a new session and
        its SUBSCRIBE, and nothing would ever arrive in that session.
        """
        if dropped := sorted((self.subscriptions | self._unwanted) - self._wanted):
            log.info("unsubscribing from what is no longer wanted", filters=dropped)
            _, self._unsuback_for = self._client.unsubscribe(dropped)
        elif not self._wanted:
            self.subscribed = True
        if self._wanted and (self._is_v5 or not self.confirmed):
            self._retained.subscribing()
            options = [(name, self._options(name)) for name in self._wire_filters]
            _, self._suback_for = self._client.subscribe(options)
        self.subscriptions |= self._wanted

    def _options(self, name: str) -> Any:
        if not self._is_v5:
            return self._settings.mqtt_qos
        return SubscribeOptions(qos=self._settings.mqtt_qos, retainHandling=self._retained.handling(name))

    def _on_subscribe(self, _c: object, _u: object, packet_id: int, reasons: list[ReasonCode], _p: Any) -> None:
        if self._drops.answered(packet_id, reasons) or packet_id != self._suback_for:
            return
        answers = list(zip(self._wire_filters, reasons, strict=False))
        self._retained.granted(name for name, reason in answers if not reason.is_failure)
        refused = [f"{name} ({reason})" for name, reason in answers if reason.is_failure]
        lowered = [name for name, reason in answers if not reason.is_failure and reason.value < self._settings.mqtt_qos]
        self.problem = _subscription_problem(refused, lowered)
        self.subscribed = self.confirmed = self.problem is None
        if self.problem:
            self._subscribe_at_s = self._clock() + RESUBSCRIBE_S
        else:
            self.subscriptions = self._wanted

    def _note_unsubscribed(self, reasons: Sequence[ReasonCode]) -> None:
        """What is no longer wanted is gone; only who wants nothing else waits for that."""
        if self._wanted:
            return
        refused = sorted({str(reason) for reason in reasons if reason.is_failure})
        self.subscribed = self.confirmed = not refused
        if refused:
            self.problem = f"the broker refused to unsubscribe ({', '.join(refused)}). Allow it in the broker's ACL."
            self._subscribe_at_s = self._clock() + RESUBSCRIBE_S
        else:
            self.problem, self.subscriptions = None, frozenset()

    # -- the barrier

    def _send_barrier_when_due(self) -> None:
        """UNSUBSCRIBE a filter that nobody uses: its answer proves that all PUBACKs sent before it were seen.

        And that all that the broker had sent by then was received: so it also tells whether replays are over.
        """
        mark = self._acks.mark()
        unmarked = mark - (self._barriers[-1].mark if self._barriers else self._proven)
        if unmarked < BARRIER_EVERY_ACKS:
            if self._barriers or not (unmarked or (self._takes_in and self._retained.due)):
                return
            if self._takes_in and self._clock() - self._barrier_s < BARRIER_EVERY_S:
                return
        _, packet_id = self._client.unsubscribe(BARRIER)
        if packet_id is not None:
            probes = not any(barrier.probes for barrier in self._barriers)
            self._barriers.append(_Barrier(packet_id, mark, probes))
            if probes:
                self._retained.probe()

    def _on_unsubscribe(self, _c: object, _u: object, packet_id: int, reasons: list[ReasonCode], _p: Any) -> None:
        if packet_id == self._unsuback_for:
            self._note_unsubscribed(reasons)
        if not any(barrier.packet_id == packet_id for barrier in self._barriers):
            return
        barrier = self._barriers.popleft()
        while barrier.packet_id != packet_id:  # sent earlier, answered later: what this one proves holds for it as well
            barrier = self._barriers.popleft()
        self._inbox.prove(self._acks.prove(barrier.mark))
        if barrier.probes and self._takes_in:  # else there may be more at the broker than was counted here
            self._retained.probed(self._acks.outstanding)
        self._proven = barrier.mark
        self._barrier_s = self._clock()


def wire_filters(settings: Settings, filters: Sequence[str]) -> list[str]:
    """The filters as the broker knows them: of a shared subscription where MQTT_SHARED_GROUP asks for one."""
    group = settings.mqtt_shared_group
    return [f"$share/{group}/{name}" if group else name for name in filters]


def _subscription_problem(refused: Sequence[str], lowered: Sequence[str]) -> str | None:
    if refused:
        names = ", ".join(refused)
        return f"the broker refused to subscribe to {names}. Allow it in the broker's ACL, or change MQTT_TOPICS."
    if lowered:
        names = ", ".join(lowered)
        return f"the broker grants only QoS 0 for {names}, and may lose messages. Raise its limit, or set MQTT_QOS=0."
    return None


@functools.cache
def _unfit() -> str | None:
    """Why the fast client cannot be used, found out once."""
    reason = why_unfit()
    if reason:
        log.warning(
            "messages are received by paho's own reading, which takes ten times the CPU",
            reason=reason,
            remedy="install paho-mqtt 2.2, or set MQTT_RECEIVE=stock to be told no more",
        )
    return reason


def client_class(settings: Settings) -> type[FastClient | StockClient]:
    """The client that the settings ask for, if it fits the paho that is installed."""
    return StockClient if settings.mqtt_receive == "stock" or _unfit() else FastClient


def _leave_writing_to_the_loop(*_: object) -> None:
    return None


def prepare_client(client: mqtt.Client, settings: Settings) -> None:
    """Credentials, websocket path and TLS as the settings ask, read from their files as they are now."""
    username, password = settings.mqtt_credentials()
    if username is not None or password is not None:
        client.username_pw_set(username, password)
    if settings.mqtt_transport == "websockets":
        client.ws_set_options(path=settings.mqtt_ws_path)
        client.on_socket_open = _have_frames_sent_whole
    if settings.mqtt_tls:
        client.tls_set_context(tls_context(settings))


def _have_frames_sent_whole(_client: object, _userdata: object, websocket: Any) -> None:
    """Have a websocket say that it would block, where it could send a frame only in part.

    It says that 0 bytes were sent, and paho then forgets the packet, and the one that it tries next: PUBACKs that were
    never sent would be proven by the next barrier. Tried again, the rest of the frame is sent.
    """
    send = websocket.send

    def send_whole(data: bytes) -> int:
        sent = int(send(data))
        if data and not sent:
            raise BlockingIOError
        return sent

    websocket.send = send_whole


def tls_context(settings: Settings) -> ssl.SSLContext:
    """A fresh context, read from the files as they are now. `SettingsError` names the file that does not do."""
    try:
        context = ssl.create_default_context(cafile=settings.mqtt_tls_ca and str(settings.mqtt_tls_ca))
    except OSError as error:
        raise _unusable("MQTT_TLS_CA", settings.mqtt_tls_ca, error, "certificates of an authority") from error
    if settings.mqtt_tls_cert:
        try:
            context.load_cert_chain(str(settings.mqtt_tls_cert), settings.mqtt_tls_key and str(settings.mqtt_tls_key))
        except OSError as error:
            what = "a certificate that belongs to MQTT_TLS_KEY"
            raise _unusable("MQTT_TLS_CERT", settings.mqtt_tls_cert, error, what) from error
    return context


def _unusable(setting: str, path: object, error: OSError, wanted: str) -> SettingsError:
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    return SettingsError([Problem(setting, str(path), f"cannot be used: {reason}.", f"Give a PEM file with {wanted}.")])
