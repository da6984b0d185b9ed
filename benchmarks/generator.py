"""Publishes to a real broker, at a cost far below the broker's own: raw sockets, packets made before.

`Flood` sends all of a load as fast as the broker acknowledges: over some connections, each with `WINDOW` messages in
flight, PUBACKs counted by the bytes they have. `Paced` sends at a fixed rate in ticks of a millisecond; each message
carries the time it was handed to the socket, in microseconds, and some of them, drawn at random so that they fall into
step with nothing, go to the topic of a probe device.

Each runs as a process of its own, on one thread, and is asked over a pipe. Publishing is MQTT 3.1.1, QoS 1.
"""

from __future__ import annotations

import multiprocessing
import random
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Self

from benchmarks.feed import HOST
from benchmarks.telemetry import DEVICES, PROBE, Load, packets, publish

CONNECTIONS = 4
WINDOW = 500
"""Messages in flight of each connection."""
PAUSE_S = 0.0005
"""Between two rounds of reading and writing: many small packets a system call, for the broker as well as for us."""
TICK_S = 0.001

_IDS = 65_535


@dataclass(frozen=True, slots=True)
class Published:
    """What a generator has done so far. Times are of the monotonic clock."""

    sent: int
    acknowledged: int
    began_s: float
    acknowledged_s: float
    late_ms: float
    """How late the latest tick of a paced run was: a wait of the generator that no latency may be blamed for."""
    probes: int
    """Messages that went to the probe device."""


class _Generator:
    """A process that publishes; a context manager."""

    def __init__(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, *arguments), name=name, daemon=True)
        self._last: Published | None = None

    def __enter__(self) -> Self:
        """Start, connect, and make the messages."""
        self._process.start()
        self._pipe.recv()
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
        """Begin to publish."""
        self._pipe.send("go")

    def finished(self, timeout_s: float = 0.0) -> Published | None:
        """What was published, once every message is acknowledged; None before. EOFError when the process has died."""
        if self._last is None and self._pipe.poll(timeout_s):
            self._last = self._pipe.recv()
        return self._last


class Flood(_Generator):
    """Everything as fast as it is acknowledged."""

    def __init__(self, port: int, load: Load) -> None:
        super().__init__("benchmarks-flood", _flood, port, load)


class Paced(_Generator):
    """`rate` messages a second for `duration_s`, `probe_share` of them to the probe device."""

    def __init__(self, port: int, *, rate: float, duration_s: float, probe_share: float = 0.0) -> None:
        super().__init__("benchmarks-paced", _paced, port, rate, duration_s, probe_share)


def _flood(pipe: Connection, port: int, load: Load) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us hears it as well, and ends us
    store = packets(load, protocol=4)
    links = []
    for number in range(CONNECTIONS):
        first, end = (len(store) * each // CONNECTIONS for each in (number, number + 1))
        data = store.data[first * store.stride : end * store.stride]
        ids = [1 + each % _IDS for each in range(end - first)]
        data[store.id_offset :: store.stride] = bytes(each >> 8 for each in ids)
        data[store.id_offset + 1 :: store.stride] = bytes(each & 0xFF for each in ids)
        links.append(_Link(_connect(port, f"bench-flood-{number}"), memoryview(data), store.stride))
    pipe.send("ready")
    pipe.recv()
    began_s = time.monotonic()
    poll = select.poll()
    by_descriptor = {link.socket.fileno(): link for link in links}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    for link in links:
        link.send()
    while any(link.acknowledged < link.messages for link in links):
        for descriptor, _ in poll.poll():
            link = by_descriptor[descriptor]
            link.receive()
            link.send()
            poll.modify(descriptor, select.POLLIN | (select.POLLOUT if link.blocked else 0))
        time.sleep(PAUSE_S)
    acknowledged = sum(link.acknowledged for link in links)
    pipe.send(Published(len(store), acknowledged, began_s, time.monotonic(), 0.0, 0))
    pipe.recv()  # stay, so that the CPU time can be read


class _Link:
    """One connection of a flood and the messages that go over it."""

    def __init__(self, connection: socket.socket, data: memoryview, stride: int) -> None:
        self.socket, self._data, self._stride = connection, data, stride
        self.messages = len(data) // stride
        self.acknowledged = 0
        self.blocked = False
        self._sent_bytes = self._received_bytes = 0
        connection.setblocking(False)

    def send(self) -> None:
        """Fill the window."""
        until = min(self.acknowledged + WINDOW, self.messages) * self._stride
        try:
            if self._sent_bytes < until:
                self._sent_bytes += self.socket.send(self._data[self._sent_bytes : until])
        except BlockingIOError:
            pass
        self.blocked = self._sent_bytes < until

    def receive(self) -> None:
        """Count PUBACKs: four bytes each, and nothing else comes."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionError("the broker has closed the connection of the generator")
        self._received_bytes += len(data)
        self.acknowledged = self._received_bytes // 4


def _paced(pipe: Connection, port: int, rate: float, duration_s: float, probe_share: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = _connect(port, "bench-paced")
    connection.setblocking(False)
    pipe.send("ready")
    pipe.recv()
    total = int(rate * duration_s)
    load = Load(total)
    draw = random.Random(1)
    sent = received_bytes = probes = 0
    late_s = 0.0
    unsent = b""
    began_s = time.monotonic()
    tick = 0
    while sent < total or received_bytes < 4 * total or unsent:
        due_s = began_s + tick * TICK_S
        tick += 1
        if (wait_s := due_s - time.monotonic()) > 0:
            time.sleep(wait_s)
        due = min(total, int((time.monotonic() - began_s) * rate) + 1)
        if sent < total:
            late_s = max(late_s, time.monotonic() - due_s)
        while sent < due:
            is_probe = draw.random() < probe_share
            probes += is_probe
            payload = load.payload(sent, time.time_ns() // 1000)
            unsent += publish(PROBE if is_probe else sent % DEVICES, payload, 1 + sent % _IDS)
            sent += 1
        unsent, received_bytes = _exchange(connection, unsent, received_bytes)
        tick = max(tick, int((time.monotonic() - began_s) / TICK_S))
    pipe.send(Published(sent, received_bytes // 4, began_s, time.monotonic(), late_s * 1000, probes))
    pipe.recv()


def _exchange(connection: socket.socket, unsent: bytes, received_bytes: int) -> tuple[bytes, int]:
    try:
        if unsent:
            unsent = unsent[connection.send(unsent) :]
    except BlockingIOError:
        pass
    try:
        if not (data := connection.recv(1 << 16)):
            raise ConnectionError("the broker has closed the connection of the generator")
        received_bytes += len(data)
    except BlockingIOError:
        pass
    return unsent, received_bytes


def _connect(port: int, client_id: str) -> socket.socket:
    """A connection over MQTT 3.1.1 that has been accepted; without keepalive, so that nothing but PUBACKs comes."""
    connection = socket.create_connection((HOST, port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    name = client_id.encode()
    body = b"\x00\x04MQTT\x04\x02\x00\x00" + len(name).to_bytes(2, "big") + name
    connection.sendall(b"\x10" + bytes([len(body)]) + body)
    answer = connection.recv(4)
    if answer != b"\x20\x02\x00\x00":
        raise ConnectionError(f"the broker refused the generator: {answer.hex()}")
    return connection
