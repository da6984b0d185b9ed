"""The feed delivers as a broker does: windows, packet ids, redelivery, and PUBACKs in any form."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from benchmarks.feed import Feed
from benchmarks.telemetry import Load, remaining_length
from tests.mqtt_publish import Publish, read_publish
from tests.waiting import wait_until

CLEAN, RESUMED = 2, 0


class Subscriber:
    """A client of one connection, byte by byte."""

    def __init__(self, feed: Feed, *, flags: int, receive_maximum: int | None, protocol: int, client_id: str) -> None:
        self.protocol = protocol
        self.socket = socket.create_connection((feed.host, feed.port), timeout=20)
        self._file = self.socket.makefile("rb")
        properties = b"" if protocol == 4 else b"\x00"
        if receive_maximum is not None:
            properties = b"\x03\x21" + receive_maximum.to_bytes(2, "big")
        name = client_id.encode()
        body = b"\x00\x04MQTT" + bytes([protocol, flags, 0, 0]) + properties + len(name).to_bytes(2, "big") + name
        self.send(0x10, body)
        self.session_present = bool(self.packet()[1][0])

    def send(self, head: int, body: bytes) -> None:
        self.socket.sendall(bytes([head]) + remaining_length(len(body)) + body)

    def packet(self) -> tuple[int, bytes]:
        head = self._read(1)[0]
        length, shift = 0, 0
        while True:
            byte = self._read(1)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return head, self._read(length)

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def subscribe(self) -> None:
        self.send(0x82, b"\x00\x07" + self._none + b"\x00\x01#\x01")
        assert self.packet() == (0x90, b"\x00\x07" + self._none + b"\x01")

    @property
    def _none(self) -> bytes:
        return b"" if self.protocol == 4 else b"\x00"

    def receive(self, count: int) -> list[Publish]:
        packets = (self.packet() for _ in range(count))
        return [read_publish(head, body, protocol=self.protocol) for head, body in packets]

    def acknowledge(self, *packet_ids: int) -> None:
        self.socket.sendall(b"".join(b"\x40\x02" + number.to_bytes(2, "big") for number in packet_ids))

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@contextmanager
def subscriber(
    feed: Feed,
    *,
    flags: int = RESUMED,
    receive_maximum: int | None = None,
    protocol: int = 5,
    client_id: str = "tester",
) -> Iterator[Subscriber]:
    with closing(
        Subscriber(feed, flags=flags, receive_maximum=receive_maximum, protocol=protocol, client_id=client_id)
    ) as client:
        yield client


def ids(publishes: list[Publish]) -> list[int]:
    return [publish.packet_id for publish in publishes]


@pytest.mark.parametrize("protocol", [4, 5])
def test_every_message_comes_once_and_packet_ids_begin_anew_after_65535(protocol: int) -> None:
    messages = 70_000
    with Feed(Load(messages)) as feed, subscriber(feed, protocol=protocol) as client:
        client.subscribe()
        feed.go()

        received: list[Publish] = []
        for _ in range(messages // 500):
            received += client.receive(500)
            client.acknowledge(*ids(received[-500:]))
        wait_until(lambda: feed.progress().acknowledged == messages, what="all acknowledgements")

    assert ids(received) == [1 + number % 65_535 for number in range(messages)]
    assert len({(publish.topic, publish.payload) for publish in received}) == messages


def test_no_more_is_in_flight_than_receive_maximum_allows() -> None:
    with Feed(Load(1_000)) as feed, subscriber(feed, receive_maximum=10) as client:
        client.subscribe()
        feed.go()

        client.receive(10)
        client.send(0xC0, b"")
        assert client.packet() == (0xD0, b"")  # the answer to the ping, and no eleventh message before it
        client.acknowledge(1, 2, 3)

        assert ids(client.receive(3)) == [11, 12, 13]


def test_who_comes_back_is_sent_again_what_was_not_acknowledged_marked_and_in_order() -> None:
    with Feed(Load(1_000)) as feed:
        with subscriber(feed, receive_maximum=10) as client:
            client.subscribe()
            feed.go()
            first = client.receive(10)
            client.acknowledge(1, 2, 3, 4)
            first += client.receive(4)
            wait_until(lambda: feed.progress().acknowledged == 4, what="four acknowledgements")

        with subscriber(feed, receive_maximum=10) as client:
            again = client.receive(10)

            assert client.session_present
            assert [publish.dup for publish in again] == [True] * 10
            assert [(p.packet_id, p.topic, p.payload) for p in again] == [
                (p.packet_id, p.topic, p.payload) for p in first[4:]
            ]
            client.acknowledge(*ids(again))
            fresh = client.receive(10)
            assert (ids(fresh), fresh[0].dup) == (list(range(15, 25)), False)
            assert feed.progress().redelivered == 10


def test_a_clean_start_forgets_the_session() -> None:
    with Feed(Load(100)) as feed:
        with subscriber(feed):
            pass

        with subscriber(feed, flags=CLEAN) as client:
            assert not client.session_present


def test_acknowledgements_out_of_order_and_with_reasons_are_understood() -> None:
    with Feed(Load(6)) as feed, subscriber(feed) as client:
        client.subscribe()
        feed.go()
        client.receive(6)

        client.acknowledge(3, 1)
        client.send(0x40, b"\x00\x02\x00")
        client.send(0x40, b"\x00\x04\x00\x00")
        client.acknowledge(6, 5)
        wait_until(lambda: feed.progress().acknowledged == 6, what="all acknowledgements")

        assert feed.progress().out_of_order == 2


def test_an_acknowledgement_of_what_was_never_sent_ends_the_connection() -> None:
    with Feed(Load(6)) as feed, subscriber(feed) as client:
        client.subscribe()
        feed.go()
        client.receive(6)

        client.acknowledge(7)

        with pytest.raises(EOFError):
            client.packet()


def test_unsubscribing_from_what_nobody_has_is_answered() -> None:
    with Feed(Load(6)) as feed, subscriber(feed) as client:
        client.send(0xA2, b"\x00\x09\x00\x00\x01x")

        assert client.packet() == (0xB0, b"\x00\x09\x00\x11")


def test_several_sessions_share_the_messages_and_none_gets_another_ones() -> None:
    with Feed(Load(100)) as feed:
        with subscriber(feed, receive_maximum=10, client_id="one") as one:
            with subscriber(feed, receive_maximum=10, client_id="two") as two:
                one.subscribe()
                two.subscribe()
                feed.go()
                received = [one.receive(10), two.receive(10)]

                assert [ids(some) for some in received] == [list(range(1, 11))] * 2
                assert len({(p.topic, p.payload) for some in received for p in some}) == 20
