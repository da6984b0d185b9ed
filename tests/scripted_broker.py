"""A fake MQTT broker (3.1.1 and 5) that does what the test says, byte by byte: for what no real broker would do.

    with ScriptedBroker() as broker:
        ...                                             # connect a client to 127.0.0.1:broker.port
        connect = broker.wait_for_connect()             # what it said, once CONNACK is out
        broker.publish(b"a/\\xff", b"payload", mid=7, dup=True)
        assert broker.wait_for_pubacks(1) == [7]
        broker.drop(reset=True)

SUBSCRIBE, UNSUBSCRIBE and PINGREQ are answered; PUBLISH from the client is recorded and acknowledged. One client at a
time is spoken to, the last that connected; all records go over all connections.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from tests.waiting import wait_until

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = range(1, 8)
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT = range(8, 15)

MQTT_5 = 5
_WIDTHS = {0x01: 1, 0x17: 1, 0x19: 1, 0x21: 2, 0x22: 2, 0x23: 2, 0x02: 4, 0x11: 4, 0x18: 4, 0x27: 4}
"""Bytes of the fixed-width properties that a client sends (MQTT 5, section 2.2.2.2)."""


@dataclass(frozen=True, slots=True)
class Connect:
    """A CONNECT as it was received."""

    client_id: str
    protocol: int
    """4 is MQTT 3.1.1, 5 is MQTT 5."""
    clean_start: bool
    keepalive_s: int
    raw_properties: bytes
    username: str | None
    password: str | None

    @property
    def session_expiry_s(self) -> int | None:
        """Property 0x11, None where it was not sent."""
        return self.integer_property(0x11)

    @property
    def receive_maximum(self) -> int | None:
        """Property 0x21, None where it was not sent."""
        return self.integer_property(0x21)

    def integer_property(self, identifier: int) -> int | None:
        """A property of fixed width by its identifier, None where it was not sent."""
        at = 0
        while at < len(self.raw_properties):
            width = _WIDTHS.get(self.raw_properties[at])
            if width is None:  # text and bytes: good enough for what clients send before them
                return None
            value = int.from_bytes(self.raw_properties[at + 1 : at + 1 + width])
            if self.raw_properties[at] == identifier:
                return value
            at += 1 + width
        return None


@dataclass(frozen=True, slots=True)
class Publication:
    """A PUBLISH of the client."""

    topic: bytes
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    mid: int


@dataclass(slots=True)
class Answer:
    """What CONNACK says."""

    session_present: bool = False
    reason: int = 0
    """0 accepts. MQTT 5: 0x80 and above refuse (0x86 bad password, 0x8E taken over ...); 3.1.1: 1 to 5."""
    properties: bytes = b""
    """MQTT 5: encoded properties, without their length: `b"\\x21" + struct.pack("!H", 10)` is Receive Maximum 10."""


@dataclass(slots=True)
class Record:
    """What clients sent, in order. Appended by the connection threads, read by the test."""

    connects: list[Connect] = field(default_factory=list)
    subscribes: list[list[tuple[str, int]]] = field(default_factory=list)
    """For each SUBSCRIBE its filters with their option bytes (QoS, no local, retain handling)."""
    unsubscribes: list[list[str]] = field(default_factory=list)
    pubacks: list[int] = field(default_factory=list)
    publications: list[Publication] = field(default_factory=list)
    packets: list[int] = field(default_factory=list)
    """The type of every packet, of all connections: for questions about order."""
    disconnects: list[int] = field(default_factory=list)
    """Reason of every DISCONNECT (0 is normal)."""


class ScriptedBroker:
    """See the module. `answer` is for every CONNECT until the test changes it; `record` holds what came in."""

    host = "127.0.0.1"

    def __init__(self, *, answer: Answer | None = None) -> None:
        self.answer = answer or Answer()
        self.subscribe_reason: int | None = None
        """None grants the QoS asked for; else this byte for every filter (0x80 and above refuse)."""
        self.silent = False
        """True: nothing is answered any more, not even PINGREQ; packets are still recorded."""
        self.greeting = b""
        """What is sent before CONNACK: no broker may."""
        self.answer_subscribe = True
        """False: SUBSCRIBE and UNSUBSCRIBE are recorded only; answer with `send_raw` when it is time."""
        self.forbidden: frozenset[str] = frozenset()
        """Filters that are refused (0x87, over 3.1.1 0x80) although others are granted."""
        self.cuts_at: frozenset[str] = frozenset()
        """Filters whose SUBSCRIBE is answered by the end of the connection."""
        self.record = Record()
        self._listener = socket.create_server((self.host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._connection: socket.socket | None = None
        self._connections: list[socket.socket] = []
        self._protocol = MQTT_5
        self._ready = 0
        """CONNACKs sent that accepted."""
        self._closing = False
        self._threads = [threading.Thread(target=self._accept, name="scripted-broker", daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        with contextlib.suppress(OSError):  # wakes accept()
            socket.create_connection((self.host, self.port), timeout=1).close()
        self._threads[0].join()
        self._listener.close()
        for connection in self._connections:
            _shut(connection)
        for thread in self._threads[1:]:
            thread.join()

    # --- what the test waits for ---

    def wait_for_connect(self, count: int = 1, timeout_s: float = 10.0) -> Connect:
        """The newest CONNECT, once `count` of them (since `__enter__`) were accepted and answered."""
        wait_until(lambda: self._ready >= count, timeout_s=timeout_s, what=f"connection {count}")
        return self.record.connects[-1]

    def wait_for_subscribe(self, count: int = 1, timeout_s: float = 10.0) -> list[tuple[str, int]]:
        """The filters of the `count`th SUBSCRIBE."""
        wait_until(lambda: len(self.record.subscribes) >= count, timeout_s=timeout_s, what=f"SUBSCRIBE {count}")
        return self.record.subscribes[count - 1]

    def wait_for_pubacks(self, count: int, timeout_s: float = 10.0) -> list[int]:
        """All packet ids acknowledged so far, in order, once there are `count`."""
        wait_until(lambda: len(self.record.pubacks) >= count, timeout_s=timeout_s, what=f"{count} PUBACKs")
        return list(self.record.pubacks)

    @property
    def connected(self) -> bool:
        """Whether a client is connected now."""
        return self._connection is not None

    # --- what the test sends ---

    def publish(
        self,
        topic: bytes,
        payload: bytes,
        *,
        mid: int = 1,
        qos: int = 1,
        dup: bool = False,
        retain: bool = False,
        properties: bytes = b"",
    ) -> None:
        """Send a PUBLISH with exactly these bytes; nothing is checked, nothing is sent again by itself."""
        body = struct.pack("!H", len(topic)) + topic
        if qos:
            body += struct.pack("!H", mid)
        if self._protocol == MQTT_5:
            body += _with_length(properties)
        self.send_raw(_packet(PUBLISH, body + payload, flags=dup << 3 | qos << 1 | retain))

    def disconnect(self, reason: int) -> None:
        """Send a DISCONNECT with this reason (MQTT 5 only: 0x8E is session taken over) and close."""
        self.send_raw(_packet(DISCONNECT, bytes([reason])))
        self.drop()

    def send_raw(self, data: bytes) -> None:
        """Send any bytes to the client. Raises OSError where it is gone."""
        connection = self._connection
        if connection is None:
            raise ConnectionError("no client is connected")
        connection.sendall(data)

    def drop(self, *, reset: bool = False) -> None:
        """End the connection: in order (FIN), or as a crash does (RST)."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if reset:  # Closing with linger 0 is RST. The connection's own thread closes it, woken by the end of reading.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RD)
        else:
            _shut(connection)

    # --- threads ---

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if self._closing:
                connection.close()
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(connection)
            thread = threading.Thread(target=self._converse, args=(connection,), name="scripted-client", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _converse(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError), connection.makefile("rb") as stream:
            while packet := _read_packet(stream.read):
                self._handle(connection, *packet)
        if self._connection is connection:
            self._connection = None

    def _handle(self, connection: socket.socket, kind: int, flags: int, body: bytes) -> None:
        self.record.packets.append(kind)
        handlers = {CONNECT: self._on_connect, SUBSCRIBE: self._on_subscribe, UNSUBSCRIBE: self._on_unsubscribe}
        if kind in handlers:
            handlers[kind](connection, body)
        elif kind == PUBACK:
            self.record.pubacks.append(_short(body, 0))
        elif kind == PUBLISH:
            self._on_publish(connection, flags, body)
        elif kind == PUBREL:
            self._send(connection, _packet(PUBCOMP, body[:2]))
        elif kind == PINGREQ:
            self._send(connection, _packet(PINGRESP, b""))
        elif kind == DISCONNECT:
            self.record.disconnects.append(body[0] if body else 0)
            if not self.silent:
                _shut(connection)  # as a broker must (MQTT 5, section 3.14.4)

    def _on_connect(self, connection: socket.socket, body: bytes) -> None:
        connect = _parse_connect(body)
        self._protocol = connect.protocol
        self._connection = connection
        self.record.connects.append(connect)
        answer = self.answer
        accepted = answer.reason == 0
        body = bytes([answer.session_present and accepted, answer.reason])
        if connect.protocol == MQTT_5:
            body += _with_length(answer.properties)
        self._send(connection, self.greeting + _packet(CONNACK, body))
        if accepted:
            self._ready += 1
        else:
            self.drop()

    def _on_subscribe(self, connection: socket.socket, body: bytes) -> None:
        mid, rest = self._split(body)
        filters = []
        while rest:
            size = _short(rest, 0)
            filters.append((rest[2 : 2 + size].decode(), rest[2 + size]))
            rest = rest[3 + size :]
        self.record.subscribes.append(filters)
        if self.cuts_at.intersection(name for name, _ in filters):
            self.drop()
        elif self.answer_subscribe:
            reasons = bytes(self._grant(name, options) for name, options in filters)
            self._send(connection, _packet(SUBACK, mid + self._no_properties() + reasons))

    def _grant(self, name: str, options: int) -> int:
        if name in self.forbidden:
            return 0x87 if self._protocol == MQTT_5 else 0x80
        return options & 3 if self.subscribe_reason is None else self.subscribe_reason

    def _on_unsubscribe(self, connection: socket.socket, body: bytes) -> None:
        mid, rest = self._split(body)
        filters = []
        while rest:
            size = _short(rest, 0)
            filters.append(rest[2 : 2 + size].decode())
            rest = rest[2 + size :]
        self.record.unsubscribes.append(filters)
        if self.answer_subscribe:
            reasons = bytes([0x11] * len(filters)) if self._protocol == MQTT_5 else b""  # no subscription existed
            self._send(connection, _packet(UNSUBACK, mid + self._no_properties() + reasons))

    def _on_publish(self, connection: socket.socket, flags: int, body: bytes) -> None:
        qos = flags >> 1 & 3
        size = _short(body, 0)
        topic, rest = body[2 : 2 + size], body[2 + size :]
        mid = _short(rest, 0) if qos else 0
        rest = rest[2:] if qos else rest
        if self._protocol == MQTT_5:
            length, at = _variable(rest, 0)
            rest = rest[at + length :]
        self.record.publications.append(Publication(topic, rest, qos, bool(flags & 1), bool(flags & 8), mid))
        if qos:
            self._send(connection, _packet(PUBACK if qos == 1 else PUBREC, struct.pack("!H", mid)))

    def _split(self, body: bytes) -> tuple[bytes, bytes]:
        """Packet id and payload of a SUBSCRIBE or UNSUBSCRIBE; its properties are left out."""
        if self._protocol != MQTT_5:
            return body[:2], body[2:]
        length, at = _variable(body, 2)
        return body[:2], body[at + length :]

    def _no_properties(self) -> bytes:
        return b"\x00" if self._protocol == MQTT_5 else b""

    def _send(self, connection: socket.socket, data: bytes) -> None:
        if not self.silent:
            connection.sendall(data)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        connection.shutdown(socket.SHUT_RDWR)


def _packet(kind: int, body: bytes, *, flags: int = 0) -> bytes:
    return bytes([kind << 4 | (2 if kind in (PUBREL, SUBSCRIBE, UNSUBSCRIBE) else flags)]) + _with_length(body)


def _with_length(data: bytes) -> bytes:
    """The data after its length as a variable byte integer."""
    length, encoded = len(data), bytearray()
    while True:
        length, digit = divmod(length, 128)
        encoded.append(digit | (0x80 if length else 0))
        if not length:
            return bytes(encoded) + data


def _variable(data: bytes, at: int) -> tuple[int, int]:
    """A variable byte integer, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not data[at - 1] & 0x80:
            return value, at


def _short(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2])


def _read_packet(read: Callable[[int], bytes]) -> tuple[int, int, bytes] | None:
    """Type, flags and body of the next packet, None at the end."""
    head = read(1)
    if not head:
        return None
    size = b""
    while not size or size[-1] & 0x80:
        digit = read(1)
        if not digit:
            return None
        size += digit
    return head[0] >> 4, head[0] & 0x0F, read(_variable(size, 0)[0])


def _parse_connect(body: bytes) -> Connect:
    at = 2 + _short(body, 0)
    protocol, flags, keepalive_s = body[at], body[at + 1], _short(body, at + 2)
    at += 4
    properties = b""
    if protocol == MQTT_5:
        length, at = _variable(body, at)
        properties, at = body[at : at + length], at + length
    fields = []
    if protocol == MQTT_5 and flags & 0x04:  # the will's properties stand after the client id
        raise NotImplementedError("wills over MQTT 5")
    while at < len(body):
        size = _short(body, at)
        fields.append(body[at + 2 : at + 2 + size].decode())
        at += 2 + size
    texts = iter(fields[1 + (2 if flags & 0x04 else 0) :])
    username = next(texts) if flags & 0x80 else None
    password = next(texts) if flags & 0x40 else None
    return Connect(fields[0], protocol, bool(flags & 0x02), keepalive_s, properties, username, password)
