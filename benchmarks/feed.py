"""An MQTT server that only delivers, faster than Mosquitto: what is measured behind it is not the broker.

It accepts CONNECT (3.1.1 and 5), SUBSCRIBE, UNSUBSCRIBE and PINGREQ, and then streams messages that were made before,
QoS 1, as fast as Receive Maximum (MQTT 5) or `window` (3.1.1) allows. Packet ids count from 1 to 65,535 and begin
anew, as Mosquitto's do. A session outlives its connection: whoever comes back with the same client id and without clean
start is told so, and is first sent again, with DUP, what it has not acknowledged. All subscribers share one store of
messages, each message goes to one of them: with one subscriber that is a subscription, with several a shared one.

It costs half a microsecond a message: packet ids are written into thousands of packets by two slice assignments, and a
run of PUBACKs is compared with what it has to be in one step. PUBACKs out of order are understood, one by one.

`Feed` starts the server as a process of its own and asks it over a pipe; `_Server` is what runs there, on one thread.
"""

from __future__ import annotations

import multiprocessing
import select
import signal
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Self

from benchmarks.telemetry import Load, packets, remaining_length

HOST = "127.0.0.1"
WINDOW = 1_000
"""Messages in flight over MQTT 3.1.1, as the project's mosquitto.conf has it."""
MOST_AT_ONCE = 2_000
"""Messages that are handed to a session at a time: a megabyte at most is copied for nothing, if it is cut."""

_IDS = 65_535
_DUP = 0x08
_HIGH = bytes((1 + number % _IDS) >> 8 for number in range(2 * _IDS))
_LOW = bytes((1 + number % _IDS) & 0xFF for number in range(2 * _IDS))
_PUBACKS = b"".join(b"\x40\x02" + bytes(pair) for pair in zip(_HIGH, _LOW, strict=True))


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the feed is. Times are of the monotonic clock, which all processes share."""

    sent: int
    """Messages handed to sessions."""
    acknowledged: int
    """Messages whose PUBACK has come."""
    redelivered: int
    began_s: float | None
    """When the first message was sent."""
    acknowledged_s: float | None
    """When the last PUBACK came."""
    sessions: dict[str, int]
    """Messages acknowledged by each client id."""
    out_of_order: int
    """PUBACKs that came before an earlier one."""


class Feed:
    """The server as a process of its own; a context manager. It streams after `go`, to who has subscribed."""

    host = HOST

    def __init__(self, load: Load, *, protocol: int = 5, window: int = WINDOW) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, load, protocol, window), name="benchmarks-feed", daemon=True
        )
        self.port = 0

    def __enter__(self) -> Self:
        """Start, and wait until the messages are made."""
        self._process.start()
        self.port = self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def go(self) -> None:
        """Begin to stream."""
        self._ask("go")

    def progress(self) -> Progress:
        """Where it is now."""
        answer = self._ask("progress")
        assert isinstance(answer, Progress)
        return answer

    def _ask(self, word: str) -> Any:
        self._pipe.send(word)
        return self._pipe.recv()


def _serve(pipe: Connection, load: Load, protocol: int, window: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us hears it as well, and ends us
    _Server(pipe, load, protocol=protocol, window=window).run()


@dataclass(slots=True)
class _Session:
    """What is kept of a client id, over its connections. Messages of a session are counted from 0: `given`, `done`."""

    client_id: str
    given: int = 0
    done: int = 0
    """Messages before this one are acknowledged; `early` are, though later."""
    early: set[int] = field(default_factory=set)
    pending: deque[tuple[int, bytearray]] = field(default_factory=deque)
    """(first message, packets) of what was handed out and may have to be sent again."""
    subscribed: bool = False
    maximum: int = WINDOW


class _Client:
    """One connection; it knows its session once CONNECT has come."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.session: _Session | None = None
        self.version = 4
        self.received = b""
        self.to_send: deque[memoryview] = deque()


class _Server:
    """The loop: reads, hands out, writes."""

    def __init__(self, pipe: Connection, load: Load, *, protocol: int, window: int) -> None:
        self._pipe, self._load, self._protocol, self._window = pipe, load, protocol, window
        self._store = packets(load, protocol=protocol)
        self._messages = load.messages
        self._going = False
        self._given = self._redelivered = self._out_of_order = 0
        self._began_s: float | None = None
        self._acknowledged_s: float | None = None
        self._sessions: dict[str, _Session] = {}
        self._clients: dict[int, _Client] = {}
        self._poll = select.poll()
        self._writing: set[int] = set()
        self._listener = socket.create_server((HOST, 0), backlog=16)

    def run(self) -> None:
        """Until the process is killed, or whoever started it is gone."""
        self._poll.register(self._pipe.fileno(), select.POLLIN)
        self._poll.register(self._listener.fileno(), select.POLLIN)
        self._pipe.send(self._listener.getsockname()[1])
        while True:
            for descriptor, event in self._poll.poll():
                if descriptor == self._pipe.fileno():
                    self._answer()
                elif descriptor == self._listener.fileno():
                    self._accept()
                elif (client := self._clients.get(descriptor)) is not None:
                    self._attend(client, event)

    # -- who asks

    def _answer(self) -> None:
        try:
            word = self._pipe.recv()
        except EOFError:
            raise SystemExit from None
        if word == "go":
            self._going = True
            for client in list(self._clients.values()):
                self._attend(client, 0)
            self._pipe.send(None)
        else:
            self._pipe.send(self._progress())

    def _progress(self) -> Progress:
        done = {session.client_id: session.done + len(session.early) for session in self._sessions.values()}
        return Progress(
            sent=self._given,
            acknowledged=sum(done.values()),
            redelivered=self._redelivered,
            began_s=self._began_s,
            acknowledged_s=self._acknowledged_s,
            sessions=done,
            out_of_order=self._out_of_order,
        )

    # -- connections

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._clients[connection.fileno()] = _Client(connection)
        self._poll.register(connection.fileno(), select.POLLIN)

    def _close(self, client: _Client) -> None:
        descriptor = client.socket.fileno()
        self._poll.unregister(descriptor)
        self._writing.discard(descriptor)
        del self._clients[descriptor]
        client.socket.close()

    def _attend(self, client: _Client, event: int) -> None:
        """Read what is there, and send what may be sent."""
        try:
            if event & ~select.POLLOUT and not self._read(client):
                self._close(client)
                return
            self._write(client)
            while self._hand_out(client):
                self._write(client)
        except ConnectionError:
            self._close(client)

    def _read(self, client: _Client) -> bool:
        data = client.socket.recv(1 << 18)
        if not data:
            return False
        self._take(client, client.received + data if client.received else data)
        return True

    def _write(self, client: _Client) -> None:
        """As much as the socket takes; the rest when it is ready again."""
        queue = client.to_send
        while queue:
            try:
                sent = client.socket.send(queue[0])
            except BlockingIOError:
                sent = 0
            if sent < len(queue[0]):
                queue[0] = queue[0][sent:]
                break
            queue.popleft()
        descriptor = client.socket.fileno()
        if bool(queue) != (descriptor in self._writing):
            self._poll.modify(descriptor, select.POLLIN | (select.POLLOUT if queue else 0))
            (self._writing.add if queue else self._writing.discard)(descriptor)

    # -- what goes out

    def _hand_out(self, client: _Client) -> bool:
        """Give the session some of what it may have in flight, unless the socket is behind anyway; whether it did."""
        session = client.session
        if not self._going or session is None or not session.subscribed or client.to_send:
            return False
        count = min(session.maximum - (session.given - session.done), self._messages - self._given, MOST_AT_ONCE)
        if count <= 0:
            return False
        if self._began_s is None:
            self._began_s = time.monotonic()
        stride, offset = self._store.stride, self._store.id_offset
        chunk = self._store.data[self._given * stride : (self._given + count) * stride]
        first = session.given % _IDS
        chunk[offset::stride] = _HIGH[first : first + count]
        chunk[offset + 1 :: stride] = _LOW[first : first + count]
        session.pending.append((session.given, chunk))
        session.given += count
        self._given += count
        client.to_send.append(memoryview(chunk))
        return True

    def _redeliver(self, client: _Client, session: _Session) -> None:
        """Send again, marked, what is not acknowledged [MQTT-4.4.0-1]."""
        stride = self._store.stride
        for first, chunk in session.pending:
            fresh = bytearray(chunk)
            fresh[::stride] = bytes([fresh[0] | _DUP]) * (len(fresh) // stride)
            numbers = range(max(first, session.done), first + len(fresh) // stride)
            wanted = [number for number in numbers if number not in session.early]
            self._redelivered += len(wanted)
            if len(wanted) == len(numbers):
                client.to_send.append(memoryview(fresh)[(numbers.start - first) * stride :])
            else:
                for number in wanted:
                    client.to_send.append(memoryview(fresh)[(number - first) * stride :][:stride])

    # -- what comes in

    def _take(self, client: _Client, data: bytes) -> None:
        """All complete packets of `data`; the rest waits for more."""
        position, end = 0, len(data)
        while end - position >= 2:
            if data[position] == 0x40 and data[position + 1] == 2 and end - position >= 4:
                position += self._take_pubacks(client, data, position, (end - position) // 4)
                continue
            length, start = _length(data, position + 1)
            if start is None or start + length > end:
                break
            self._take_packet(client, data[position], data[start : start + length])
            position = start + length
        client.received = data[position:]

    def _take_pubacks(self, client: _Client, data: bytes, position: int, count: int) -> int:
        """The longest run of PUBACKs that is as expected, else one; how many bytes that was."""
        session = client.session
        if session is None:
            raise ConnectionError("a PUBACK before CONNECT")
        self._acknowledged_s = time.monotonic()
        at = 4 * (session.done % _IDS)
        count = min(count, session.given - session.done)
        while count and not session.early:
            if data[position : position + 4 * count] == _PUBACKS[at : at + 4 * count]:
                session.done += count
                self._forget(session)
                return 4 * count
            count //= 2
        self._take_puback(session, int.from_bytes(data[position + 2 : position + 4], "big"))
        return 4

    def _take_puback(self, session: _Session, packet_id: int) -> None:
        """One that may be out of order: found by its id among those in flight, which are fewer than there are ids."""
        number = session.done + (packet_id - 1 - session.done) % _IDS
        if number >= session.given or number in session.early:
            raise ConnectionError(f"a PUBACK for {packet_id}, which is not in flight")
        if number != session.done:
            self._out_of_order += 1
        session.early.add(number)
        while session.done in session.early:
            session.early.remove(session.done)
            session.done += 1
        self._forget(session)

    def _forget(self, session: _Session) -> None:
        pending, stride = session.pending, self._store.stride
        while pending and pending[0][0] + len(pending[0][1]) // stride <= session.done:
            pending.popleft()

    def _take_packet(self, client: _Client, head: int, body: bytes) -> None:
        kind = head >> 4
        properties = b"\x00" if client.version == 5 else b""
        if kind == 1:
            self._connect(client, body)
        elif kind == 4 and client.session is not None:  # with a reason code
            self._acknowledged_s = time.monotonic()
            self._take_puback(client.session, int.from_bytes(body[:2], "big"))
        elif kind == 8:
            filters = _filters(body, client.version, options=1)
            if client.session is not None and any(not name.startswith(b"$SYS") for name in filters):
                client.session.subscribed = True
            _reply(client, 0x90, body[:2] + properties + b"\x01" * len(filters))
        elif kind == 10:
            codes = b"\x11" * len(_filters(body, client.version, options=0)) if client.version == 5 else b""
            _reply(client, 0xB0, body[:2] + properties + codes)
        elif kind == 12:
            _reply(client, 0xD0, b"")
        elif kind == 14:
            raise ConnectionError("it has left")

    def _connect(self, client: _Client, body: bytes) -> None:
        client.version, flags = body[6], body[7]
        if client.version != self._protocol:
            self._make_anew(client.version)
        position, maximum = 10, self._window
        if client.version == 5:
            length, start = _length(body, position)
            assert start is not None
            maximum = _receive_maximum(body[start : start + length])
            position = start + length
        size = int.from_bytes(body[position : position + 2], "big")
        client_id = body[position + 2 : position + 2 + size].decode()
        for other in [other for other in self._clients.values() if other is not client]:
            if other.session is not None and other.session.client_id == client_id:
                self._close(other)
        present = not flags & 2 and client_id in self._sessions
        session = self._sessions[client_id] if present else _Session(client_id)
        session.maximum = min(maximum, _IDS - 1)
        self._sessions[client_id] = client.session = session
        _reply(client, 0x20, bytes([present, 0]) + (b"\x00" if client.version == 5 else b""))
        if present:
            self._redeliver(client, session)

    def _make_anew(self, protocol: int) -> None:
        """The messages for the other version of MQTT: whoever comes first decides which it is."""
        if self._sessions:
            raise ConnectionError(f"the feed speaks protocol {self._protocol} to others already")
        self._protocol, self._store = protocol, packets(self._load, protocol=protocol)


def _reply(client: _Client, head: int, body: bytes) -> None:
    client.to_send.append(memoryview(bytes([head]) + remaining_length(len(body)) + body))


def _length(data: bytes, position: int) -> tuple[int, int | None]:
    """A variable byte integer and where it ends; (0, None) where it is not complete."""
    value = 0
    for shift in (0, 7, 14, 21):
        if position >= len(data):
            return 0, None
        value |= (data[position] & 0x7F) << shift
        position += 1
        if not data[position - 1] & 0x80:
            return value, position
    raise ConnectionError("a length that does not end")


def _filters(body: bytes, version: int, *, options: int) -> list[bytes]:
    """The topic filters of SUBSCRIBE (with `options` 1) or UNSUBSCRIBE (0)."""
    position = 2
    if version == 5:
        length, start = _length(body, position)
        assert start is not None
        position = start + length
    found = []
    while position < len(body):
        size = int.from_bytes(body[position : position + 2], "big")
        found.append(body[position + 2 : position + 2 + size])
        position += 2 + size + options
    return found


_PROPERTY_BYTES = {0x11: 4, 0x17: 1, 0x19: 1, 0x21: 2, 0x22: 2, 0x27: 4}
"""Properties of CONNECT of a fixed length (MQTT 5, section 3.1.2.11)."""
_RECEIVE_MAXIMUM = 0x21


def _receive_maximum(properties: bytes) -> int:
    position = 0
    while position < len(properties):
        name = properties[position]
        position += 1
        if name == _RECEIVE_MAXIMUM:
            return int.from_bytes(properties[position : position + 2], "big")
        strings = {0x15: 1, 0x16: 1, 0x26: 2}.get(name, 0)
        position += _PROPERTY_BYTES.get(name, 0)
        for _ in range(strings):
            position += 2 + int.from_bytes(properties[position : position + 2], "big")
    return _IDS
