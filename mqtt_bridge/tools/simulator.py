"""Virtual devices: they publish readings on a fixed schedule, and faults on demand.

The schedule is open-loop: message k is due at a time that does not depend on how fast earlier ones went, so a slow
broker shows as a delay (`behind_s`) and as missed messages, never as a silently lower rate. The devices share a few
connections, each with a bounded number of unacknowledged messages. Nothing is dropped when the broker is away: the
schedule falls behind and catches up.

The thread that calls `run` makes and sends the messages; paho's threads, one a connection, count acknowledgements.
"""

from __future__ import annotations

import math
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

import orjson
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from mqtt_bridge.errors import BridgeError

WINDOW = 200
"""Unacknowledged messages a connection may have; less where the broker's Receive Maximum is less."""
BURST = 20
"""Readings in a burst: what a device sends at once after it was out of reach."""
CONNECT_S = 10.0
"""How long the broker may take to accept a connection at the start."""
PROGRESS_S = 0.5
TICK_S = 0.001
"""The schedule's resolution: what is due this soon is sent together."""
STALL_S = 0.1
"""How long to wait at most for an acknowledgement before looking at the stop event again."""

_DAY_S = 86_400.0
_PROTOCOLS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}


class SimulatorError(BridgeError):
    """The simulation cannot start: options that make no sense, or no broker. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Faults:
    """How often things go wrong: probabilities per reading, 0 to 1."""

    duplicates: float = 0.0
    """The same payload is published twice, as by a device that missed the acknowledgement."""
    garbage: float = 0.0
    """A payload that nobody can decode comes along."""
    late: float = 0.0
    """The reading is a minute to an hour old."""
    bursts: float = 0.0
    """`BURST` readings come at once, the older ones with the times at which they were due."""


class Publication(NamedTuple):
    """One message to be sent."""

    topic: str
    payload: bytes
    kind: Literal["reading", "duplicate", "garbage"]
    late: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a simulation is, for a progress bar."""

    seconds: float
    published: int
    acknowledged: int
    in_flight: int
    connected: int
    """Connections that are up."""
    behind_s: float
    """How long the most overdue message has been waiting; about 0 while the schedule is kept."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a simulation did."""

    published: int
    acknowledged: int
    """Messages for which a PUBACK came (QoS 0: that were written to the network)."""
    refused: int
    """Messages that the broker acknowledged with an error (MQTT 5: not authorised, quota exceeded ...)."""
    duplicates: int
    garbage: int
    late: int
    missed: int
    """Readings that were due before the end and were not sent."""
    seconds: float
    """From the first message to the last, without connecting and waiting for the last acknowledgements."""
    rate: float
    """Messages per second, everything included."""
    planned_rate: float | None
    """Readings per second that the schedule asks for; None when it is "as fast as possible"."""
    behind_max_s: float
    """The longest delay of a message against the schedule."""

    @property
    def readings(self) -> int:
        """Published messages that are a reading for the first time: as many as there are pairs of device and seq."""
        return self.published - self.duplicates - self.garbage

    @property
    def unacknowledged(self) -> int:
        """Messages of which nobody knows whether they arrived."""
        return self.published - self.acknowledged - self.refused


def render(summary: Summary) -> str:
    """A summary as a person reads it, with a plain word where the schedule was not kept or a message is in doubt."""
    planned = "" if summary.planned_rate is None else f" of {summary.planned_rate:,.0f} planned"
    lines = [
        f"published {summary.published:,} messages in {summary.seconds:.1f} s ({summary.rate:,.0f} a second{planned})",
        f"acknowledged {summary.acknowledged:,}, refused {summary.refused:,}, in doubt {summary.unacknowledged:,}",
        f"readings {summary.readings:,} ({summary.late:,} late), duplicates {summary.duplicates:,},"
        f" garbage {summary.garbage:,}",
    ]
    if summary.missed:
        lines.append(
            f"the schedule was not kept: {summary.missed:,} readings were not sent,"
            f" the slowest was {summary.behind_max_s:.1f} s late"
        )
    return "\n".join(lines)


def _leave_as_it_is(client: mqtt.Client) -> None:
    """For a broker that asks for nothing."""


class Simulator:
    """A number of devices, `sim-0001` and on, and the schedule by which they publish."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        devices: int,
        interval_s: float,
        count: int | None = None,
        duration_s: float | None = None,
        topic: str = "devices/{device}/telemetry",
        qos: int = 1,
        connections: int = 4,
        seed: int = 0,
        duplicates: float = 0.0,
        garbage: float = 0.0,
        late: float = 0.0,
        bursts: float = 0.0,
        protocol: str = "5",
        transport: Literal["tcp", "websockets"] = "tcp",
        prepare: Callable[[mqtt.Client], None] = _leave_as_it_is,
        drain_s: float = 10.0,
    ) -> None:
        """Every device publishes each `interval_s` (0: as fast as the broker acknowledges), evenly spread.

        Ends after `count` messages in total (faults included) or `duration_s`, whichever is first, and then waits up
        to `drain_s` for acknowledgements. `prepare` gives each client
        its credentials and its TLS. The same `seed` gives the same payloads, but for their times. Raises
        SimulatorError for options that make no sense.
        """
        faults = Faults(duplicates=duplicates, garbage=garbage, late=late, bursts=bursts)
        _check(devices=devices, interval_s=interval_s, topic=topic, qos=qos, protocol=protocol, faults=faults)
        self._host, self._port = host, port
        self._devices, self._interval_s = devices, interval_s
        self._count = math.inf if count is None else count
        self._duration_s = math.inf if duration_s is None else duration_s
        self._drain_s = drain_s
        self._room = threading.Event()
        fleet = [Device(n, topic=topic, seed=seed, interval_s=interval_s, faults=faults) for n in range(1, devices + 1)]
        shares = min(connections, devices)
        self._connections = [
            _Connection(
                _client(protocol, transport, prepare),
                _Schedule(fleet[share::shares], devices=devices, interval_s=interval_s),
                qos=qos,
                room=self._room,
            )
            for share in range(shares)
        ]

    def run(self, stop: threading.Event, progress: Callable[[Progress], None] | None = None) -> Summary:
        """Publish until the end, or until `stop` is set. Once only. SimulatorError when no broker can be reached."""
        try:
            for connection in self._connections:
                connection.open(self._host, self._port)
            seconds = self._publish(stop, progress or _ignore)
            deadline = time.monotonic() + self._drain_s
            for connection in self._connections:
                connection.drain(deadline)
        finally:
            for connection in self._connections:
                connection.close()
        return self._summary(seconds)

    @property
    def published(self) -> int:
        """Messages sent so far; any thread may ask."""
        return sum(connection.published for connection in self._connections)

    def _publish(self, stop: threading.Event, progress: Callable[[Progress], None]) -> float:
        """Keep the schedule; the seconds it took."""
        start = time.monotonic()
        next_report_s = 0.0
        while True:
            elapsed_s = min(time.monotonic() - start, self._duration_s)
            if not stop.is_set():
                self._room.clear()
                self._send_due(elapsed_s)
            if stop.is_set() or elapsed_s >= self._duration_s or self.published >= self._count:
                progress(self._progress(elapsed_s))
                return elapsed_s
            if elapsed_s >= next_report_s:
                progress(self._progress(elapsed_s))
                next_report_s = elapsed_s + PROGRESS_S
            self._wait(stop, elapsed_s, at_most_s=min(next_report_s, self._duration_s) - elapsed_s)

    def _send_due(self, elapsed_s: float) -> None:
        until_s = min(elapsed_s + TICK_S, self._duration_s)
        for connection in self._connections:
            connection.send_due(elapsed_s, until_s=until_s, at_most=self._count - self.published)

    def _wait(self, stop: threading.Event, elapsed_s: float, *, at_most_s: float) -> None:
        """Until the next message is due, or until there is room for one that is overdue."""
        overdue = [connection for connection in self._connections if connection.next_due_s <= elapsed_s]
        if not overdue:
            next_due_s = min(connection.next_due_s for connection in self._connections)
            stop.wait(min(next_due_s - elapsed_s, at_most_s))
        elif all(connection.is_starved for connection in overdue):
            self._room.wait(min(at_most_s, STALL_S))

    def _progress(self, elapsed_s: float) -> Progress:
        return Progress(
            seconds=elapsed_s,
            published=self.published,
            acknowledged=sum(connection.acknowledged for connection in self._connections),
            in_flight=sum(connection.in_flight for connection in self._connections),
            connected=sum(connection.is_connected for connection in self._connections),
            behind_s=max(connection.overdue_s(elapsed_s) for connection in self._connections),
        )

    def _summary(self, seconds: float) -> Summary:
        def total(name: str) -> int:
            return sum(getattr(connection, name) for connection in self._connections)

        finished = self.published >= self._count
        return Summary(
            published=self.published,
            acknowledged=total("acknowledged"),
            refused=total("refused"),
            duplicates=total("duplicates"),
            garbage=total("garbage"),
            late=total("late"),
            missed=0 if finished else sum(connection.missed(seconds) for connection in self._connections),
            seconds=seconds,
            rate=self.published / seconds if seconds else 0.0,
            planned_rate=self._devices / self._interval_s if self._interval_s else None,
            behind_max_s=max(connection.behind_max_s for connection in self._connections),
        )


class Device:
    """One virtual device: its state, and the messages it sends."""

    def __init__(self, number: int, *, topic: str, seed: int, interval_s: float, faults: Faults) -> None:
        self.number = number
        self.name = f"sim-{number:04d}"
        self._topic = topic.replace("{device}", self.name)
        self._random = random.Random(f"{seed}/{number}")
        self._interval_s = interval_s
        self._faults = faults
        self._seq = 0
        self._day_phase = self._random.random()
        self._mean = self._random.gauss(19.0, 3.0)
        self._swing = self._random.uniform(2.0, 6.0)
        self._drift = 0.0
        self._charge = self._random.uniform(60.0, 100.0)

    def messages(self, now: datetime) -> Iterator[Publication]:
        """What the device sends when its turn comes: a reading, or more where faults say so."""
        for age_s in self._ages_s():
            late = self._happens(self._faults.late)
            age_s += self._random.uniform(60.0, 3600.0) if late else 0.0
            reading = self._reading(now - timedelta(seconds=age_s))
            yield Publication(self._topic, reading, "reading", late)
            if self._happens(self._faults.duplicates):
                yield Publication(self._topic, reading, "duplicate")
            if self._happens(self._faults.garbage):
                yield Publication(self._topic, self._broken(reading), "garbage")

    def _ages_s(self) -> list[float]:
        if self._happens(self._faults.bursts):
            return [missed * self._interval_s for missed in range(BURST - 1, -1, -1)]
        return [0.0]

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self._random.random() < probability

    def _reading(self, at: datetime) -> bytes:
        """The next reading. Its values depend on the seed and on seq alone, so that runs can be compared."""
        self._seq += 1
        uptime_s = self._seq * self._interval_s
        self._drift = 0.999 * self._drift + self._random.gauss(0.0, 0.02)
        cycle = self._swing * math.sin(2 * math.pi * (uptime_s / _DAY_S + self._day_phase))
        temperature = self._mean + cycle + self._drift + self._random.gauss(0.0, 0.1)
        humidity = 52.0 - 2.0 * (cycle + self._drift) + self._random.gauss(0.0, 0.5)
        return orjson.dumps(
            {
                "ts": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                "seq": self._seq,
                "temperature": round(temperature, 2),
                "humidity": round(min(100.0, max(0.0, humidity)), 1),
                "battery": round(max(0.0, self._charge - uptime_s / (2 * _DAY_S)), 1),
            }
        )

    def _broken(self, reading: bytes) -> bytes:
        """Bytes that are neither JSON nor text: cut off, or with a byte that UTF-8 does not know."""
        if self._random.random() < 0.5:
            return reading[: self._random.randrange(10, len(reading))]
        return b"{\xff\xfe" + self._random.randbytes(12)


class _Schedule:
    """When which of a connection's devices is due, in seconds since the start. Turns are taken in order."""

    def __init__(self, members: Sequence[Device], *, devices: int, interval_s: float) -> None:
        self._members = members
        self._gap_s = interval_s / devices
        self._interval_s = interval_s
        self._turn = 0

    @property
    def due_s(self) -> float:
        """When the next turn is due."""
        rounds, index = divmod(self._turn, len(self._members))
        return rounds * self._interval_s + (self._members[index].number - 1) * self._gap_s

    def lag_s(self, elapsed_s: float, due_s: float) -> float:
        """How late that is; never late where the schedule is "as fast as possible"."""
        return max(0.0, elapsed_s - due_s) if self._interval_s else 0.0

    def take(self) -> Device:
        device = self._members[self._turn % len(self._members)]
        self._turn += 1
        return device

    def skipped(self, elapsed_s: float) -> int:
        """Turns due by then that were not taken."""
        if not self._interval_s:
            return 0
        rounds, rest_s = divmod(elapsed_s, self._interval_s)
        due = int(rounds) * len(self._members)
        due += sum((member.number - 1) * self._gap_s < rest_s for member in self._members)
        return max(0, due - self._turn)


class _Connection:
    """One MQTT connection with the devices that share it.

    The counts of what was sent belong to the sending thread. `_lock` guards `in_flight`, `acknowledged`, `refused`,
    `is_connected`, `is_starved` and `_window`, which paho's thread changes. paho runs callbacks while it holds its own
    locks, so `publish` is never called under ours.
    """

    def __init__(self, client: mqtt.Client, schedule: _Schedule, *, qos: int, room: threading.Event) -> None:
        self._client = client
        self._schedule = schedule
        self._qos = qos
        self._room = room
        self._pending: deque[Publication] = deque()
        self._pending_due_s = 0.0
        self._lock = threading.Condition()
        self._answered = threading.Event()
        self._refusal: str | None = None
        self._window = WINDOW
        self.is_starved = False
        """Whether a message had to wait for room, or for a connection."""
        self.is_connected = False
        self.in_flight = 0
        self.acknowledged = 0
        self.refused = 0
        self.published = 0
        self.duplicates = 0
        self.garbage = 0
        self.late = 0
        self.behind_max_s = 0.0
        # More than that is never handed to paho, which would queue without a bound.
        client.max_inflight_messages_set(WINDOW)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_pre_connect = self._on_pre_connect
        client.on_publish = self._on_publish

    @property
    def next_due_s(self) -> float:
        """When the next message is due, or was."""
        return self._pending_due_s if self._pending else self._schedule.due_s

    def overdue_s(self, elapsed_s: float) -> float:
        return self._schedule.lag_s(elapsed_s, self.next_due_s)

    def missed(self, elapsed_s: float) -> int:
        return self._schedule.skipped(elapsed_s) + sum(waiting.kind == "reading" for waiting in self._pending)

    def open(self, host: str, port: int) -> None:
        """Connect and wait for the broker's yes; afterwards paho reconnects by itself."""
        where = f"{host}:{port}"
        try:
            self._client.connect(host, port, keepalive=30)
        except (OSError, ValueError) as error:
            raise SimulatorError(f"No broker answers at {where}: {error}. Check MQTT_HOST and MQTT_PORT.") from error
        self._client.loop_start()
        if not self._answered.wait(CONNECT_S):
            raise SimulatorError(f"What answers at {where} is no MQTT broker, or it wants TLS: no CONNACK came.")
        if self._refusal is not None:
            raise SimulatorError(f"The broker at {where} refuses: {self._refusal}. Check user name and password.")

    def send_due(self, elapsed_s: float, *, until_s: float, at_most: float) -> None:
        """Send what is due before `until_s`, as far as window and number allow; one window at most, to be fair."""
        for _ in range(int(min(at_most, WINDOW))):
            if not self._pending and not self._take_turn(until_s):
                return
            if not self._send(self._pending[0]):
                return
            self._count(self._pending.popleft(), behind_s=self._schedule.lag_s(elapsed_s, self._pending_due_s))

    def drain(self, deadline: float) -> None:
        """Wait until every message is acknowledged, or until the deadline (monotonic)."""
        with self._lock:
            self._lock.wait_for(lambda: self.in_flight == 0, max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Disconnect, for good."""
        self._client.disconnect()
        self._client.loop_stop()
        # paho closes its wake-up sockets when it is collected. Callbacks make a cycle, which would put that off.
        del self._client

    def _take_turn(self, until_s: float) -> bool:
        due_s = self._schedule.due_s
        if due_s >= until_s:
            return False
        self._pending_due_s = due_s
        self._pending.extend(self._schedule.take().messages(datetime.now(UTC)))
        return True

    def _send(self, publication: Publication) -> bool:
        """False when there is no room, or no connection."""
        if not self._reserve():
            return False
        result = self._client.publish(publication.topic, publication.payload, qos=self._qos)
        # paho keeps a message of QoS 1 also when the connection just broke, and sends it after the reconnect.
        if self._qos > 0 or result.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
            return True
        with self._lock:
            self.in_flight = max(0, self.in_flight - 1)
        return False

    def _reserve(self) -> bool:
        with self._lock:
            # Decides whether a message goes now; a no is remembered, so that the wake-up comes.
            self.is_starved = not self.is_connected or self.in_flight >= self._window
            self.in_flight += not self.is_starved
            return not self.is_starved

    def _count(self, publication: Publication, *, behind_s: float) -> None:
        self.published += 1
        self.duplicates += publication.kind == "duplicate"
        self.garbage += publication.kind == "garbage"
        self.late += publication.late
        self.behind_max_s = max(self.behind_max_s, behind_s)

    def _on_connect(
        self, client: mqtt.Client, userdata: Any, flags: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._refusal = str(reason)
        else:
            with self._lock:
                self.is_connected = True
                self._window = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
        self._answered.set()
        self._room.set()

    def _on_disconnect(
        self, client: mqtt.Client, userdata: Any, flags: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        with self._lock:
            self.is_connected = False

    def _on_pre_connect(self, client: mqtt.Client, userdata: Any) -> None:
        if self._qos == 0:
            with self._lock:
                # paho has just thrown away what it had not written: nobody will ever acknowledge that.
                self.in_flight = 0
                self._lock.notify_all()

    def _on_publish(
        self, client: mqtt.Client, userdata: Any, mid: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        with self._lock:
            self.in_flight = max(0, self.in_flight - 1)
            if reason.is_failure:
                self.refused += 1
            else:
                self.acknowledged += 1
            if self.is_starved and self.in_flight <= self._window // 2:
                self.is_starved = False
                self._room.set()
            if self.in_flight == 0:
                self._lock.notify_all()


def _client(
    protocol: str, transport: Literal["tcp", "websockets"], prepare: Callable[[mqtt.Client], None]
) -> mqtt.Client:
    client = mqtt.Client(
        CallbackAPIVersion.VERSION2,
        # Random: two simulators with the same id would throw each other out.
        client_id=f"mqtt-bridge-sim-{secrets.token_hex(5)}",
        protocol=_PROTOCOLS[protocol],
        transport=transport,
    )
    client.reconnect_delay_set(min_delay=1, max_delay=5)
    prepare(client)
    return client


def _check(*, devices: int, interval_s: float, topic: str, qos: int, protocol: str, faults: Faults) -> None:
    wrong = {
        "devices: at least one.": devices < 1,
        "interval: 0 (as fast as possible) or more seconds.": not 0 <= interval_s < math.inf,
        "topic: a topic to publish to has no + and #, and is not empty.": not topic or bool(set("+#\0") & set(topic)),
        "qos: 0, 1 or 2.": qos not in (0, 1, 2),
        "protocol: 5 or 3.1.1.": protocol not in _PROTOCOLS,
        "faults: probabilities are from 0 to 1.": not all(0 <= getattr(faults, name) <= 1 for name in faults.__slots__),
    }
    problems = [text for text, applies in wrong.items() if applies]
    if problems:
        raise SimulatorError("\n".join(problems))


def _ignore(progress: Progress) -> None:
    pass
