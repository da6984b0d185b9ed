"""What a broker sends is received whole, whichever client reads it and whatever the bytes travel in.

One connection, stepped by the test, without a pipeline. The broker is scripted; between the two the bytes are cut into
pieces: segments, TLS records, websocket frames.
"""

from __future__ import annotations

import secrets
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme

from mqtt_bridge.acks import AckTracker, SendAcks
from mqtt_bridge.broker_connection import BrokerConnection
from mqtt_bridge.model import Run
from mqtt_bridge.settings import Settings
from tests.packets import PINGRESP, Publish, text, unsuback
from tests.proxy import Fragmenter, TcpProxy
from tests.scripted_broker import ScriptedBroker
from tests.waiting import wait_until
from tests.websocket_relay import WebsocketRelay

WAYS = ["tcp", "tls", "websockets", "websockets over tls"]
WHOLE = (1 << 20,)
"""Nothing is cut."""


@dataclass
class Received:
    """An inbox that keeps everything."""

    publishes: list[Publish] = field(default_factory=list)
    runs: int = 0
    session_to_raise = None
    rest_s = 0.0

    def connected(self, *, session_present: bool, send_acks: SendAcks) -> None:
        pass

    def disconnected(self) -> None:
        pass

    def prove(self, positions: Sequence[int]) -> None:
        pass

    def receive(self, run: Run) -> None:
        self.runs += 1
        self.publishes += [
            Publish(topic, payload, run.qos, run.retain, run.dup, packet_id)
            for topic, payload, packet_id in zip(run.topics, run.payloads, run.packet_ids, strict=True)
        ]


@dataclass
class Line:
    """A scripted broker, and a connection to it that is subscribed."""

    broker: ScriptedBroker
    connection: BrokerConnection
    received: Received
    link: TcpProxy
    is_v5: bool

    def step_until(self, done: Callable[[], Any], what: str) -> None:
        def step() -> Any:
            assert self.connection.step(0.05), self.connection.problem
            return done()

        wait_until(step, timeout_s=20, interval_s=0, what=what)

    def send(self, data: bytes) -> None:
        self.broker.send_raw(data)


MakeLine = Callable[..., Line]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """Certificate of an authority, and what a server of its needs."""
    issuer, path = trustme.CA(), tmp_path_factory.mktemp("authority") / "ca.pem"
    issuer.cert_pem.write_to_path(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issuer.issue_cert("127.0.0.1").configure_cert(context)
    return path, context


@pytest.fixture
def make_line(authority: tuple[Path, ssl.SSLContext]) -> Iterator[MakeLine]:
    """Connects over one of WAYS, in pieces of `sizes`: of segments or records, and of frames."""
    with ExitStack() as stack:

        def make(receive: str, protocol: str, way: str, *, sizes: Sequence[int] = WHOLE, **changes: Any) -> Line:
            broker = stack.enter_context(ScriptedBroker())
            port = broker.port
            if way.startswith("websockets"):
                port = stack.enter_context(WebsocketRelay(broker.host, port, sizes=sizes)).port
                # Or frames would be no larger than segments.
                sizes = (3 * sizes[0] + 1,)
            tls = authority[1] if way.endswith("tls") else None
            link = stack.enter_context(Fragmenter(broker.host, port, sizes=sizes, tls=tls))
            settings = Settings(
                mqtt_host=broker.host,
                mqtt_port=link.port,
                mqtt_client_id=f"line-{secrets.token_hex(4)}",
                mqtt_receive=receive,
                mqtt_protocol=protocol,
                mqtt_transport="websockets" if way.startswith("websockets") else "tcp",
                mqtt_tls=tls is not None,
                mqtt_tls_ca=authority[0] if tls else None,
                **changes,
            )
            received = Received()
            connection = BrokerConnection(settings, filters=("#",), inbox=received, acks=AckTracker())
            stack.callback(connection.close)
            connection.open()
            line = Line(broker, connection, received, link, protocol == "5")
            line.step_until(lambda: connection.subscribed, "SUBACK")
            return line

        yield make


COMBINATIONS = [
    (receive, protocol, way) for receive in ("fast", "stock") for protocol in ("5", "3.1.1") for way in WAYS
]
EVERY = pytest.mark.parametrize(("receive", "protocol", "way"), COMBINATIONS)


def mixed(count: int, *, is_v5: bool) -> tuple[bytes, list[Publish]]:
    """A stream with so many messages of every kind, and packets of other kinds among them."""
    stream, expected = b"", []
    for number in range(1, count + 1):
        publish = Publish(
            b"site/%d" % (number % 7),
            b"x" * (number * 37 % 400) if number % 50 else bytes(40_000),
            qos=int(number % 3 > 0),
            retain=number % 11 == 0,
            dup=number % 13 == 0 and number % 3 > 0,
            packet_id=number if number % 3 else 0,
            properties=b"\x26" + text(b"key") + text(b"%d" % number) if is_v5 and number % 5 == 0 else b"",
        )
        expected.append(publish._replace(properties=b""))
        stream += publish.encode(is_v5=is_v5)
        if number % 10 == 0:
            stream += PINGRESP + unsuback(60_000, is_v5=is_v5)
    return stream, expected


@EVERY
def test_a_stream_in_pieces_is_received_whole_and_acknowledged_in_order(make_line, receive, protocol, way):
    line = make_line(receive, protocol, way, sizes=(7, 1, 2, 3, 64, 1000))
    stream, expected = mixed(200, is_v5=line.is_v5)

    line.send(stream)
    line.step_until(lambda: len(line.received.publishes) >= len(expected), "all messages")
    ids = [publish.packet_id for publish in expected if publish.qos]
    line.connection.acknowledge(ids[:50])
    for packet_id in ids[50:60]:
        line.connection.acknowledge([packet_id])
    line.connection.acknowledge(ids[60:])
    line.step_until(lambda: len(line.broker.record.pubacks) >= len(ids), "all acknowledgements")

    assert line.received.publishes == expected
    assert line.broker.record.pubacks == ids


@EVERY
def test_many_packets_in_one_piece_are_all_received_before_anything_else_comes(make_line, receive, protocol, way):
    """Frames and records are taken apart by paho and by OpenSSL: `select` does not know what they hold back."""
    line = make_line(receive, protocol, way)
    stream, expected = mixed(45, is_v5=line.is_v5)

    for _ in range(3):
        line.received.publishes.clear()
        line.send(stream)
        line.step_until(lambda: len(line.received.publishes) >= len(expected), "all of them")
        assert line.received.publishes == expected


@pytest.mark.parametrize("receive", ["fast", "stock"])
@pytest.mark.parametrize("way", WAYS)
def test_a_large_message_is_received_whole(make_line, receive, way):
    line = make_line(receive, "5", way)
    large = Publish(b"large", secrets.token_bytes(3 << 20), packet_id=7)

    line.send(large.encode(is_v5=True) + Publish(b"after", packet_id=8).encode(is_v5=True))
    line.step_until(lambda: len(line.received.publishes) >= 2, "both")

    assert line.received.publishes == [large, Publish(b"after", packet_id=8)]


@EVERY
def test_the_end_of_the_connection_in_the_midst_of_a_message_is_noticed(make_line, receive, protocol, way):
    line = make_line(receive, protocol, way)
    first, second = (Publish(b"a", b"x" * 300, packet_id=each).encode(is_v5=line.is_v5) for each in (1, 2))

    line.send(first + second[:-5])
    line.step_until(lambda: line.received.publishes, "the first")
    line.broker.drop()
    wait_until(lambda: not line.connection.step(0.05), interval_s=0, what="its end")

    assert [publish.packet_id for publish in line.received.publishes] == [1]
    assert not line.connection.connected


@pytest.mark.parametrize("receive", ["fast", "stock"])
@pytest.mark.parametrize("way", WAYS)
def test_acknowledgements_wait_for_a_line_that_takes_no_more(make_line, receive, way):
    """A frame that could be sent only in part is not forgotten, nor what comes after it."""
    line = make_line(receive, "5", way)
    client, ids = line.connection._client, []
    sock = client.socket()
    getattr(sock, "_socket", sock).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # soon full
    line.link.stall()

    blocked = 0
    while blocked < 5:
        # The kernel takes as much as 32 KB whole, or not at all.
        part = range(1, 20_001) if receive == "fast" else range(1, 301)
        line.connection.acknowledge(part)
        ids += part
        client.loop_write()
        blocked += client.want_write()
    line.link.resume()
    line.step_until(lambda: not client.want_write(), "everything to be sent")
    wait_until(lambda: len(line.broker.record.pubacks) >= len(ids), timeout_s=30, what="all acknowledgements")

    assert line.broker.record.pubacks == ids


@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_acknowledge_is_no_trouble(make_line, way):
    line = make_line("fast", "5", way)

    line.connection.acknowledge([])
    line.connection.acknowledge([7])
    line.step_until(lambda: line.broker.record.pubacks, "the acknowledgement after it")

    assert line.broker.record.pubacks == [7]
    assert not line.connection._client.want_write()


@pytest.mark.parametrize("receive", ["fast", "stock"])
def test_a_message_before_the_connection_is_accepted_is_not_taken_in(receive):
    """It could belong to any session."""
    with ScriptedBroker() as broker:
        settings = Settings(mqtt_host=broker.host, mqtt_port=broker.port, mqtt_client_id="early", mqtt_receive=receive)
        received = Received()
        connection = BrokerConnection(settings, filters=("#",), inbox=received, acks=AckTracker())
        broker.greeting = Publish(b"a").encode(is_v5=True)
        connection.open()
        wait_until(lambda: not connection.step(0.05), interval_s=0, what="its end")
        connection.close()

    assert received.publishes == []
    assert "before it accepted the connection" in connection.problem
