"""paho's client reading by the buffer, and paho's own beside it: the same stream, however it is cut, is the same.

The socket is played by `Wire`, which gives out the pieces that it was given. The tests pass with every paho that the
bridge runs on (see `tests/acceptance/test_paho_versions.py`).
"""

from __future__ import annotations

import socket
import struct
import tracemalloc
from collections.abc import Iterable
from typing import Any

import paho.mqtt
import paho.mqtt.client as mqtt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from structlog.testing import capture_logs

from mqtt_bridge import broker_connection, fast_client
from mqtt_bridge.broker_connection import client_class
from mqtt_bridge.fast_client import READ_BYTES, FastClient, why_unfit
from mqtt_bridge.settings import Settings
from mqtt_bridge.stock_client import StockClient
from tests.packets import PINGRESP, Publish, cut, suback, text, unsuback, with_length

CONNACK = {True: b"\x20\x03\x00\x00\x00", False: b"\x20\x02\x00\x00"}
A, B, C = Publish(b"a", b"1", packet_id=1), Publish(b"b", b"22", packet_id=2), Publish(b"c", b"", packet_id=3)
EITHER = pytest.mark.parametrize("class_", [FastClient, StockClient])
V5_AND_V3 = pytest.mark.parametrize("is_v5", [True, False])


class Wire:
    """A socket that gives out these pieces, each in as many calls as it takes, and then would block.

    `breaks` is given out as the end of the connection where it comes.
    """

    BREAKS = b""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.pieces = list(pieces)
        self.asked: list[int] = []
        """How much each call of `recv` asked for."""
        self.closed = False

    def recv(self, size: int) -> bytes:
        self.asked.append(size)
        if not self.pieces:
            raise BlockingIOError
        piece = self.pieces[0]
        if len(piece) > size:
            self.pieces[0] = piece[size:]
            return piece[:size]
        return self.pieces.pop(0)

    def send(self, data: bytes) -> int:
        return len(data)

    def close(self) -> None:
        self.closed = True


class Rig:
    """A client on a wire, and all that it tells, in order."""

    def __init__(self, class_: type[Any], wire: Any = None, *, is_v5: bool = True) -> None:
        self.told: list[Any] = []
        self.runs: list[Any] = []
        self.is_v5 = is_v5
        self.client = class_(
            self._on_run,
            lambda error: self.told.append(f"malformed: {error}"),
            CallbackAPIVersion.VERSION2,
            protocol=MQTTProtocolVersion.MQTTv5 if is_v5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self.client.on_connect = lambda _c, _u, _f, reason, _p: self.told.append(f"connected: {reason}")
        self.client.on_disconnect = lambda _c, _u, _f, reason, _p: self.told.append(f"disconnected: {reason}")
        self.client.on_subscribe = lambda _c, _u, packet_id, *_: self.told.append(f"subscribed {packet_id}")
        self.client.on_unsubscribe = lambda _c, _u, packet_id, *_: self.told.append(f"unsubscribed {packet_id}")
        self.client.on_socket_register_write = lambda *_: None
        self.wire = wire if wire is not None else Wire([])
        self.client._sock = self.wire

    def _on_run(self, run: Any) -> None:
        self.runs.append(run)
        self.told += [
            Publish(topic, payload, run.qos, run.retain, run.dup, packet_id or A.packet_id)
            for topic, payload, packet_id in zip(run.topics, run.payloads, run.packet_ids, strict=True)
        ]

    def read(self, *pieces: bytes) -> list[Any]:
        """Read all of this, unless the connection ends before; what was told of it."""
        self.wire.pieces += pieces
        before = len(self.told)
        while self.wire.pieces and self.client._sock is not None:
            if self.client.loop_read() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                break
        return self.told[before:]


def encode(publishes: Iterable[Publish], *, is_v5: bool = True) -> bytes:
    return b"".join(publish.encode(is_v5=is_v5) for publish in publishes)


def as_told(publish: Publish) -> Publish:
    """Without its properties, and with the packet id that has no meaning in QoS 0."""
    return publish._replace(properties=b"", packet_id=publish.packet_id if publish.qos else A.packet_id)


# -- a stream in pieces


def mixed(*, is_v5: bool) -> tuple[bytes, list[Any]]:
    """A stream of everything that a broker sends, and what is to be told of it."""
    parts: list[tuple[bytes, list[Any]]] = [(CONNACK[is_v5], ["connected: Success"])]
    parts += [(suback(7, is_v5=is_v5), ["subscribed 7"])]
    user = b"\x26" + text(b"key") + text(b"value") if is_v5 else b""
    publishes = [
        A,
        B,
        C,
        Publish(b"a/b", b"x" * 130, packet_id=4),
        Publish(b"a", b"0", qos=0),
        Publish(b"a", b"", qos=0, retain=True),
        Publish(b"a", b"r", retain=True, packet_id=5),
        Publish(b"a", b"d", dup=True, packet_id=6),
        Publish(b"a", b"p", properties=user, packet_id=65_535),
    ]
    parts += [(each.encode(is_v5=is_v5), [as_told(each)]) for each in publishes]
    parts.insert(4, (PINGRESP, []))
    parts.insert(7, (unsuback(9, is_v5=is_v5), ["unsubscribed 9"]))
    parts.append((PINGRESP + unsuback(10, is_v5=is_v5), ["unsubscribed 10"]))
    return b"".join(data for data, _ in parts), [each for _, told in parts for each in told]


@EITHER
@V5_AND_V3
def test_a_stream_that_is_split_at_any_byte_is_told_the_same(class_, is_v5):
    stream, expected = mixed(is_v5=is_v5)

    for at in range(1, len(stream)):
        assert Rig(class_, is_v5=is_v5).read(stream[:at], stream[at:]) == expected


@EITHER
@V5_AND_V3
@pytest.mark.parametrize("sizes", [[1], [2], [3], [1, 2, 3, 5, 8], [100], [1 << 20]])
def test_a_stream_in_pieces_of_any_size_is_told_the_same(class_, is_v5, sizes):
    stream, expected = mixed(is_v5=is_v5)

    assert Rig(class_, is_v5=is_v5).read(*cut(stream, sizes)) == expected


others = st.sampled_from(["ping", "suback", "unsuback"])
publishes = st.builds(
    Publish,
    st.one_of(st.sampled_from([b"a", b"a/b/c"]), st.text(st.characters(codec="utf-8"), min_size=1).map(str.encode)),
    st.one_of(st.binary(max_size=10), st.integers(0, 20_000).map(bytes)),
    qos=st.integers(0, 1),
    retain=st.booleans(),
    dup=st.booleans(),
    packet_id=st.integers(1, 65_535),
    properties=st.sampled_from([b"", b"\x01\x01", b"\x26" + text(b"k") + text(b"v" * 300)]),
)


@V5_AND_V3
@EITHER
@given(st.lists(st.one_of(publishes, others), max_size=15), st.lists(st.integers(1, 5000), min_size=1, max_size=8))
def test_any_stream_in_any_pieces_is_told_as_it_was_sent(class_, is_v5, packets, sizes):
    stream, expected = b"", []
    for number, packet in enumerate(packets, 1):
        if packet == "ping":
            stream += PINGRESP
        elif packet == "suback":
            stream, expected = stream + suback(number, is_v5=is_v5), [*expected, f"subscribed {number}"]
        elif packet == "unsuback":
            stream, expected = stream + unsuback(number, is_v5=is_v5), [*expected, f"unsubscribed {number}"]
        else:
            stream, expected = stream + packet.encode(is_v5=is_v5), [*expected, as_told(packet)]

    assert Rig(class_, is_v5=is_v5).read(*cut(stream, sizes)) == expected


@EITHER
def test_both_clients_tell_the_same_properties(class_):
    properties = (
        b"\x01\x01\x02\x00\x00\x00\x09\x03" + text(b"text/plain") + b"\x08" + text(b"r") + b"\x09" + text(b"\x00\xff")
    ) + 2 * (b"\x26" + text(b"k") + text(b"v") + b"\x0b\x80\x01")
    rig = Rig(class_)

    rig.read(encode([A._replace(properties=properties), B, A._replace(properties=b"\x23\x00\x01")]))

    assert [properties for run in rig.runs for properties in run.properties] == [
        {
            "PayloadFormatIndicator": 1,
            "MessageExpiryInterval": 9,
            "ContentType": "text/plain",
            "ResponseTopic": "r",
            "CorrelationData": "00ff",
            "SubscriptionIdentifier": [128, 128],
            "UserProperty": [["k", "v"], ["k", "v"]],
        },
        None,
        None,
    ]


@EITHER
def test_an_alias_is_remembered_until_the_connection_ends(class_):
    named, anonymous = Publish(b"a", b"1", properties=b"\x23\x00\x05"), Publish(b"", b"2", properties=b"\x23\x00\x05")
    other = Publish(b"b", b"3", properties=b"\x23\x00\x05")

    told = Rig(class_).read(*cut(encode([named, anonymous, other, anonymous]), [4]))

    assert [publish.topic for publish in told] == [b"a", b"a", b"b", b"b"]
    assert Rig(class_).read(encode([anonymous]))[0].startswith("malformed")


def test_a_topic_that_is_not_utf_8_is_told_as_it_came():
    for class_ in (FastClient, StockClient):
        assert Rig(class_).read(encode([Publish(b"a/\xff")])) == [Publish(b"a/\xff")]


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_what_is_told_is_bytes_whatever_the_socket_gives(kind):
    """paho's websocket gives a bytearray, in 2.0 and 2.1."""
    rig = Rig(FastClient)

    rig.wire.recv = lambda size: kind(Wire.recv(rig.wire, size))
    rig.read(*cut(encode([A, B._replace(properties=b"\x01\x01")]), [3]))

    assert {type(column) for run in rig.runs for column in (*run.topics, *run.payloads)} == {bytes}


# -- one hand-over per read, and bounds


def test_messages_of_one_read_are_handed_on_at_once():
    rig = Rig(FastClient)

    rig.read(encode([A, B, C] * 100))

    assert [len(run.topics) for run in rig.runs] == [300]


def test_a_call_reads_about_as_much_as_a_buffer_and_leaves_the_rest():
    rig = Rig(FastClient)
    stream = encode([A] * 50_000)
    rig.wire.pieces = cut(stream, [16_384])

    rig.client.loop_read()

    taken = sum(len(run.topics) for run in rig.runs) * len(encode([A]))
    assert READ_BYTES - len(encode([A])) < taken < 2 * READ_BYTES


def test_a_plain_socket_is_not_asked_again_when_it_had_less_than_was_asked_for(monkeypatch):
    asked: list[int] = []
    receive = mqtt.Client._sock_recv
    monkeypatch.setattr(mqtt.Client, "_sock_recv", lambda self, size: (asked.append(size), receive(self, size))[1])
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        rig = Rig(FastClient, near)
        far.sendall(encode([A, B]))

        rig.client.loop_read()
        rig.client._sock = None

    assert (rig.told, asked) == ([A, B], [READ_BYTES])


def test_what_tls_or_a_websocket_hold_back_is_asked_for_until_there_is_no_more():
    """`select` does not know of it: who stops early waits for the next record, or frame, to come."""
    rig = Rig(FastClient, Wire([encode([A]), encode([B]), encode([C])]))

    rig.client.loop_read()

    assert rig.told == [A, B, C]


class Walks(FastClient):
    """Counts how much it looks at."""

    looked_at = 0

    def _walk(self, data: bytes) -> Any:
        self.looked_at += len(data)
        return super()._walk(data)


@pytest.mark.parametrize("sizes", [[READ_BYTES], [1, 100, READ_BYTES]])
def test_a_large_message_is_looked_at_once_however_many_pieces_it_comes_in(sizes):
    size = 20 << 20
    large = Publish(b"a", bytes(size), packet_id=2)
    stream = encode([A, large, C])
    rig = Rig(Walks)

    told = rig.read(*cut(stream, sizes))

    assert [len(publish.payload) for publish in told] == [1, size, 0]
    assert rig.client.looked_at < len(stream) + 4 * READ_BYTES
    assert max(rig.wire.asked) <= size + READ_BYTES


def test_a_message_that_was_handed_on_is_not_kept():
    rig = Rig(FastClient)
    pieces = cut(encode([Publish(b"a", bytes(8 << 20)), A]) + encode([B])[:3], [READ_BYTES])
    rig.client._on_run = lambda run: None
    tracemalloc.start()
    try:
        rig.wire.pieces, pieces = pieces, []
        while rig.wire.pieces:
            rig.client.loop_read()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert kept < 1 << 20


# -- what ends the connection


MALFORMED = {
    "no body": b"\x32\x00",
    "a topic longer than the packet": b"\x32\x05\x00\xffabc",
    "packet id 0": b"\x32\x07\x00\x01a\x00\x00\x00x",
    "no topic": b"\x32\x05\x00\x00\x00\x01\x00",
    "an unknown alias": b"\x32\x08\x00\x00\x00\x01\x03\x23\x00\x05",
    "properties longer than the packet": b"\x32\x07\x00\x01a\x00\x01\x7fx",
    "QoS 2": b"\x34\x07\x00\x01a\x00\x01\x00x",
    "QoS 3": b"\x36\x07\x00\x01a\x00\x01\x00x",
    "a length that does not end": b"\x32\xff\xff\xff\xff\x01",
    "a length that does not end, of another packet": b"\x90\xff\xff\xff\xff\x01",
}


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("case", MALFORMED)
def test_what_came_before_a_malformed_packet_is_told_then_the_connection_ends_with_a_reason(case, size):
    rig = Rig(FastClient)

    told = rig.read(*cut(encode([A, B]) + MALFORMED[case] + encode([C]), [size]))

    assert told[:2] == [A, B]
    assert [each.split(":")[0] for each in told[2:]] == ["malformed", "disconnected"]
    assert rig.wire.closed
    assert rig.client.socket() is None


def test_another_packet_that_cannot_be_read_ends_the_connection_with_a_reason():
    told = Rig(FastClient).read(encode([A]) + b"\xb0\x06\x00\x01\x02\x26\x00\x11" + encode([B]))

    assert told[0] == A
    assert [each.split(":")[0] for each in told[1:]] == ["malformed", "disconnected"]


HEADS = st.sampled_from([kind << 4 | flags for kind in range(16) for flags in (0, 2) if kind != 3])
BODIES = st.lists(st.one_of(st.integers(0, 2), st.integers(0, 255)), max_size=9).map(bytes)


@V5_AND_V3
@EITHER
@given(st.tuples(HEADS, BODIES))
def test_any_other_packet_is_handled_or_ends_the_connection_and_raises_nothing(class_, is_v5, packet):
    head, body = packet
    rig = Rig(class_, is_v5=is_v5)

    told = rig.read(CONNACK[is_v5] + bytes([head]) + with_length(body) + A.encode(is_v5=is_v5))
    rig.client._sock = None

    assert told[0] == "connected: Success"
    ended = any(str(each).startswith(("disconnected", "malformed")) for each in told)
    assert ended != (told[-1] == A)


@EITHER
@V5_AND_V3
def test_a_broker_that_refuses_ends_the_connection(class_, is_v5):
    told = Rig(class_, is_v5=is_v5).read((b"\x20\x03\x00\x87\x00" if is_v5 else b"\x20\x02\x00\x05") + PINGRESP)

    assert told[0] == "connected: Not authorized"
    assert [each.split(":")[0] for each in told] == ["connected", "disconnected"]


@pytest.mark.parametrize(
    "packet", [b"\xe0\x01\x8e", b"\xe0\x02\x8e\x00", b"\xe0\x09\x8e\x07\x1f\x00\x04gone"], ids=["bare", "0", "reason"]
)
def test_what_follows_the_end_of_the_connection_is_not_told(packet):
    rig = Rig(FastClient)

    told = rig.read(CONNACK[True] + encode([A]) + packet + encode([B]))

    assert told == ["connected: Success", A, "disconnected: Session taken over"]
    assert rig.client.loop_read() == MQTTErrorCode.MQTT_ERR_NO_CONN
    assert rig.told == told


@EITHER
def test_the_end_of_the_stream_is_the_end_of_the_connection(class_):
    rig = Rig(class_, Wire([encode([A])[:4], Wire.BREAKS]))

    rig.client.loop_read()
    rc = rig.client.loop_read() if rig.client.socket() else MQTTErrorCode.MQTT_ERR_CONN_LOST

    assert rc == MQTTErrorCode.MQTT_ERR_CONN_LOST
    assert [each.split(":")[0] for each in rig.told] == ["disconnected"]


@EITHER
@pytest.mark.parametrize("error", [ConnectionResetError, TimeoutError, OSError])
def test_an_error_of_the_socket_is_the_end_of_the_connection(class_, error):
    rig = Rig(class_)

    def fail(_size: int) -> bytes:
        raise error("so it is")

    rig.wire.recv = fail

    assert rig.client.loop_read() == MQTTErrorCode.MQTT_ERR_CONN_LOST
    assert rig.client.socket() is None


@EITHER
def test_nothing_to_read_is_no_trouble(class_):
    rig = Rig(class_)

    assert rig.client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
    assert rig.client.socket() is not None


@EITHER
@pytest.mark.parametrize("error", [RuntimeError, OverflowError, IndexError, ValueError])
def test_an_error_of_whoever_takes_the_messages_is_not_mistaken_for_the_brokers(class_, error):
    rig = Rig(class_)

    def fail(run: Any) -> None:
        raise error("a bug")

    rig.client._on_run = fail

    with pytest.raises(error, match="a bug"):
        rig.read(encode([A, B]))
    assert rig.told == []


# -- the clock by which a silent broker is noticed


def test_every_byte_is_a_sign_of_life(monkeypatch):
    """Else a broker that is in the midst of a large message, over a slow line, would be cut off."""
    rig = Rig(FastClient, Wire([]))
    rig.client._state = mqtt._ConnectionState.MQTT_CS_CONNECTED
    rig.client._keepalive = 10
    now_s = mqtt.time_func()
    monkeypatch.setattr(mqtt, "time_func", lambda: now_s)
    monkeypatch.setattr(fast_client.time, "monotonic", lambda: now_s)
    rig.client._last_msg_out = now_s
    large = encode([Publish(b"a", bytes(100))])

    for at in range(10, 110, 9):
        now_s += 9
        rig.client._last_msg_out = now_s  # PUBACKs go out meanwhile
        rig.wire.pieces.append(large[at - 10 : at - 1])
        rig.client.loop_read()
        rig.client.loop_misc()

    assert rig.client.socket() is not None
    assert not rig.client._out_packet


def test_the_answer_to_a_ping_is_heard_among_messages():
    rig = Rig(FastClient)
    rig.client._ping_t = 1.0

    rig.read(encode([A]) + PINGRESP + encode([B]))

    assert rig.client._ping_t == 0


# -- acknowledgements


@pytest.mark.parametrize("count", [1, 2, 5000])
def test_acknowledgements_of_a_run_are_one_write(count):
    sent: list[bytes] = []
    rig = Rig(FastClient)
    rig.wire.send = lambda data: (sent.append(bytes(data)), len(data))[1]

    rig.client.acknowledge(range(65_535 - count + 1, 65_536))
    rig.client.loop_write()

    assert sent == [b"".join(struct.pack("!BBH", 0x40, 2, each) for each in range(65_535 - count + 1, 65_536))]


@EITHER
def test_acknowledgements_leave_in_their_order_through_writes_that_are_cut_short(class_):
    sent = bytearray()
    rig = Rig(class_)
    turns = iter([3, BlockingIOError, 1, 2, 2, BlockingIOError] + [5] * 1000)

    def send(data: bytes) -> int:
        turn = next(turns)
        if not isinstance(turn, int):
            raise turn
        sent.extend(data[:turn])
        return min(turn, len(data))

    rig.wire.send = send
    ids = [5, 4, 3, 65_535, 1]
    rig.client.acknowledge(ids)
    rig.client.acknowledge([2])
    while rig.client.want_write():
        rig.client.loop_write()

    assert [int.from_bytes(sent[at + 2 : at + 4]) for at in range(0, len(sent), 4)] == [*ids, 2]
    assert set(sent[::4]) == {0x40}


# -- is it the paho that it was made for?


def test_the_paho_that_is_installed_is_fit():
    assert why_unfit() is None


def without(name: str) -> Any:
    """What makes a paho whose clients have no such attribute."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        if hasattr(mqtt.Client, name):
            monkeypatch.delattr(mqtt.Client, name)
            return
        make = mqtt.Client.__init__

        def make_without(self: Any, *arguments: Any, **options: Any) -> None:
            make(self, *arguments, **options)
            delattr(self, name)

        monkeypatch.setattr(mqtt.Client, "__init__", make_without)

    return apply


def replaced(name: str, value: Any) -> Any:
    return lambda monkeypatch: monkeypatch.setattr(mqtt.Client, name, value)


def with_another_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    make = mqtt.Client.__init__

    def make_other(self: Any, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        self._in_packet["parsed"] = False

    monkeypatch.setattr(mqtt.Client, "__init__", make_other)


CLOCK = "_last_bytes_received" if hasattr(mqtt.Client(CallbackAPIVersion.VERSION2), "_last_bytes_received") else None
OTHERS = {
    **{f"without {name}": without(name) for name in ("_sock_recv", "_packet_handle", "_packet_queue", "_easy_log")},
    **{f"without {name}": without(name) for name in ("_msgtime_mutex", "_in_packet", "_out_packet", "_protocol")},
    f"without {CLOCK or '_last_msg_in'}": without(CLOCK or "_last_msg_in"),
    "without loop_read": without("loop_read"),
    "loop_read reads otherwise": replaced("loop_read", lambda self, max_packets=1: self._sock.recv(1)),
    "loop_read raises": replaced("loop_read", lambda self: 1 / 0),
    "packets are handled elsewhere": replaced("_packet_handle", lambda self: MQTTErrorCode.MQTT_ERR_SUCCESS),
    "packets are queued elsewhere": replaced("_packet_queue", lambda *_: MQTTErrorCode.MQTT_ERR_SUCCESS),
    "the constructor wants more": replaced("__init__", lambda self: None),
    "another shape of packet": with_another_packet,
    "another version": lambda monkeypatch: monkeypatch.setattr(paho.mqtt, "__version__", "2.3.0"),
    "another major version": lambda monkeypatch: monkeypatch.setattr(paho.mqtt, "__version__", "3.0.0rc1"),
    "no version": lambda monkeypatch: monkeypatch.delattr(paho.mqtt, "__version__"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what is half made is collected
@pytest.mark.parametrize("how", OTHERS)
def test_a_paho_that_works_otherwise_is_unfit_with_a_reason_and_never_raises(monkeypatch, how):
    OTHERS[how](monkeypatch)

    reason = why_unfit()

    assert reason is not None
    assert reason.startswith("paho-mqtt ")


@pytest.fixture
def asked_anew():
    """Whether paho is fit is found out once in a process."""
    broker_connection._unfit.cache_clear()
    yield
    broker_connection._unfit.cache_clear()


def test_with_an_unfit_paho_stock_is_used_with_one_warning_that_names_the_reason(monkeypatch, asked_anew):
    monkeypatch.setattr(paho.mqtt, "__version__", "2.3.0")

    with capture_logs() as logs:
        classes = [client_class(Settings()) for _ in range(3)]

    assert classes == [StockClient] * 3
    (warning,) = logs
    assert (warning["log_level"], "2.3.0" in warning["reason"]) == ("warning", True)
    assert "MQTT_RECEIVE=stock" in warning["remedy"]


def test_who_asks_for_stock_gets_it_without_a_warning(monkeypatch, asked_anew):
    monkeypatch.setattr(paho.mqtt, "__version__", "2.3.0")

    with capture_logs() as logs:
        assert client_class(Settings(mqtt_receive="stock")) is StockClient

    assert logs == []


def test_with_a_fit_paho_the_fast_client_is_used_without_a_word(asked_anew):
    with capture_logs() as logs:
        assert client_class(Settings()) is FastClient

    assert logs == []


# -- paho's own reading


@pytest.mark.parametrize("case", ["packet id 0", "no topic", "an unknown alias"])
def test_what_paho_lets_pass_stock_does_not(case):
    told = Rig(StockClient).read(encode([A]) + MALFORMED[case])

    assert told[0] == A
    assert told[1].startswith("malformed")
