"""PUBLISH packets by the run: examples, and any stream against a reader that is too simple to be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqtt_bridge.publish_packet import MalformedPublish, PublishReader, extent, is_complete
from tests.packets import PINGRESP, Publish, read_publishes, suback, text, variable, with_length

A, B, C = Publish(b"a", b"1", packet_id=1), Publish(b"b", b"", packet_id=2), Publish(b"c", b"33", packet_id=3)


def stream(*publishes, is_v5=True):
    return b"".join(publish.encode(is_v5=is_v5) for publish in publishes)


def read(data, start=0, *, is_v5=True):
    return PublishReader(is_v5=is_v5).read_run(data, start)


def columns(run):
    return run.topics, run.payloads, run.packet_ids


@pytest.mark.parametrize("is_v5", [True, False])
def test_a_run_is_all_that_follow_one_another_with_the_same_flags(is_v5):
    data = stream(A, B, C._replace(retain=True), is_v5=is_v5)

    run, end = read(data, is_v5=is_v5)

    assert columns(run) == ([b"a", b"b"], [b"1", b""], [1, 2])
    assert (run.qos, run.retain, run.dup, run.properties) == (1, False, False, [None, None])
    run, end = read(data, end, is_v5=is_v5)
    assert (columns(run), run.retain, end) == (([b"c"], [b"33"], [3]), True, len(data))


def test_qos_0_has_no_packet_id():
    run, _ = read(stream(A._replace(qos=0), B._replace(qos=0)))

    assert (run.qos, run.packet_ids, run.payloads) == (0, [0, 0], [b"1", b""])


def test_a_packet_of_another_kind_ends_a_run():
    data = stream(A) + PINGRESP + stream(B)

    run, end = read(data)

    assert (run.topics, end) == ([b"a"], len(stream(A)))


def test_what_is_not_there_to_its_end_is_left():
    whole = stream(A, B)

    for size in range(len(stream(A)), len(whole)):
        run, end = read(whole[:size])
        assert (run.topics, end) == ([b"a"], len(stream(A)))
    for size in range(1, len(stream(A))):
        assert read(whole[:size]) == (None, 0)


@pytest.mark.parametrize("size", [0, 1, 120, 121, 122, 127, 128, 16_370, 16_383, 16_384, 2_097_151, 2_097_152])
def test_payloads_of_every_length_of_length_are_read(size):
    big = Publish(b"a", bytes(size))

    run, end = read(stream(big, B))

    assert list(map(len, run.payloads)) == [size, 0]
    assert end == len(stream(big, B))


def test_what_is_handed_on_does_not_hold_on_to_what_was_read():
    data = stream(A, B)

    run, _ = read(data)

    assert {type(column) for column in (*run.topics, *run.payloads)} == {bytes}


def test_properties_are_told_by_message():
    pair = b"\x26" + text(b"k") + text(b"v")

    run, _ = read(stream(A, B._replace(properties=pair), C._replace(properties=b"\x7f")))

    assert run.properties == [None, {"UserProperty": [["k", "v"]]}, {"undecodable": "7f"}]


def test_long_properties_have_a_long_length():
    pair = b"\x26" + text(b"k") + text(b"v" * 60_000)

    run, _ = read(stream(A._replace(properties=pair), B))

    assert run.properties[0]["UserProperty"] == [["k", "v" * 60_000]]
    assert run.payloads == [b"1", b""]


def test_over_mqtt_3_1_1_there_are_no_properties():
    run, _ = read(stream(Publish(b"a", b"\x05abc"), is_v5=False), is_v5=False)

    assert run.payloads == [b"\x05abc"]


# -- topic aliases


def alias(number, publish):
    return publish._replace(properties=b"\x23" + number.to_bytes(2))


def test_an_alias_stands_for_the_topic_that_it_was_given_last():
    anonymous = Publish(b"", b"x")
    data = stream(alias(1, A), alias(1, anonymous), alias(2, B), alias(1, anonymous), alias(1, C), alias(1, anonymous))

    run, _ = read(data)

    assert run.topics == [b"a", b"a", b"b", b"a", b"c", b"c"]
    assert run.properties == [None] * 6


def test_an_alias_lasts_over_runs_and_ends_with_the_connection():
    reader, data = PublishReader(is_v5=True), stream(alias(7, A))
    reader.read_run(data, 0)

    run, _ = reader.read_run(stream(alias(7, Publish(b"", b"x", qos=0))), 0)

    assert run.topics == [b"a"]
    with pytest.raises(MalformedPublish):
        read(stream(alias(7, Publish(b"", b"x"))))


def test_an_alias_among_others_is_left_out_of_them():
    run, _ = read(stream(A._replace(properties=b"\x01\x01\x23\x00\x05\x02\x00\x00\x00\x09")))

    assert run.properties == [{"PayloadFormatIndicator": 1, "MessageExpiryInterval": 9}]


# -- what is malformed


def packet(head, body):
    return bytes([head]) + with_length(body)


MALFORMED = {
    "no body": b"\x32\x00",
    "no length of a topic": packet(0x32, b"\x00"),
    "a topic longer than the packet": packet(0x32, b"\x00\xffabc"),
    "a topic as long as the packet": packet(0x32, text(b"abc")),
    "half a packet id": packet(0x32, text(b"a") + b"\x00"),
    "packet id 0": packet(0x32, text(b"a") + b"\x00\x00\x00x"),
    "no properties": packet(0x32, text(b"a") + b"\x00\x01"),
    "properties longer than the packet": packet(0x32, text(b"a") + b"\x00\x01\x7fx"),
    "properties whose length does not end": packet(0x32, text(b"a") + b"\x00\x01\xff\xff\xff\xff\x01"),
    "properties whose length is cut short": packet(0x32, text(b"a") + b"\x00\x01\x80"),
    "no topic": packet(0x32, text(b"") + b"\x00\x01\x00x"),
    "an unknown alias": packet(0x32, text(b"") + b"\x00\x01\x03\x23\x00\x05x"),
    "QoS 2": packet(0x34, text(b"a") + b"\x00\x01\x00x"),
    "QoS 3": packet(0x36, text(b"a") + b"\x00\x01\x00x"),
    "a length that does not end": b"\x32\xff\xff\xff\xff\x01",
    "QoS 0 without a topic": packet(0x30, text(b"") + b"\x00x"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_came_before_a_malformed_packet_is_told_first(case):
    reader = PublishReader(is_v5=True)
    data = stream(A, B) + MALFORMED[case] + stream(C)

    run, end = reader.read_run(data, 0)

    assert (run.packet_ids, end) == ([1, 2], len(stream(A, B)))
    with pytest.raises(MalformedPublish):
        reader.read_run(data, end)


@pytest.mark.parametrize("case", MALFORMED)
def test_it_is_malformed_whatever_stands_behind_it(case):
    for behind in (b"", b"\x00", bytes(300), b"\xff" * 300, stream(A) * 20):
        with pytest.raises(MalformedPublish):
            read(MALFORMED[case] + behind)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"\x90", None), (b"\x90\x80", None), (b"\x90\x03ab", (2, 5)), (b"\xd0\x00", (2, 2)), (b"\x90\x80\x01", (3, 131))],
)
def test_where_a_packet_ends_is_known_as_soon_as_its_length_is(data, expected):
    assert extent(data, 0) == expected
    assert is_complete(data, 0) == (expected is not None and expected[1] <= len(data))


# -- any stream


topics = st.one_of(st.sampled_from([b"a", b"a/b", b"\xff", "ä/ß".encode()]), st.binary(min_size=1, max_size=9))
payloads = st.one_of(st.binary(max_size=20), st.integers(100, 400).map(bytes))
own_properties = st.one_of(
    st.just(b""),
    st.binary(max_size=12).filter(lambda content: 0x23 not in content),
    st.tuples(st.binary(max_size=5), st.binary(max_size=200)).map(lambda pair: b"\x26" + text(pair[0]) + text(pair[1])),
)
publishes = st.builds(
    Publish,
    topics,
    payloads,
    qos=st.integers(0, 1),
    retain=st.booleans(),
    dup=st.booleans(),
    packet_id=st.integers(1, 65_535),
    properties=own_properties,
)
aliased = st.builds(alias, st.integers(1, 3), st.sampled_from([Publish(b""), Publish(b"a", qos=0), Publish(b"b")]))


def read_all(data, *, is_v5):
    """What the reader tells of a stream until it ends, until another packet, or until it is malformed."""
    reader, found, position = PublishReader(is_v5=is_v5), [], 0
    try:
        while position < len(data) and data[position] >> 4 == 3:
            run, position = reader.read_run(data, position)
            if run is None:
                break
            found += [
                (topic, payload, run.qos, run.retain, run.dup, packet_id)
                for topic, payload, packet_id in zip(run.topics, run.payloads, run.packet_ids, strict=True)
            ]
    except MalformedPublish:
        return found, True
    return found, False


def naively(data, *, is_v5):
    found, malformed = read_publishes(data, is_v5=is_v5)
    return [publish[:6] for publish in found], malformed


@given(st.lists(st.one_of(publishes, aliased), max_size=12), st.booleans())
def test_any_messages_are_read_as_they_were_sent(messages, is_v5):
    data = stream(*messages, is_v5=is_v5) + suback(1, is_v5=is_v5)

    assert read_all(data, is_v5=is_v5) == naively(data, is_v5=is_v5)


@given(st.lists(publishes, min_size=1, max_size=6), st.booleans(), st.data())
def test_a_stream_with_wrong_bytes_in_it_is_read_as_far_as_it_goes(messages, is_v5, draw):
    data = bytearray(stream(*messages, is_v5=is_v5))
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    if is_v5 and b"\x23" in data:
        data = data.replace(b"\x23", b"\x26")  # the simple reader knows aliases only where they stand alone

    assert read_all(bytes(data), is_v5=is_v5) == naively(bytes(data), is_v5=is_v5)


@given(st.binary(max_size=60).map(lambda rest: b"\x32" + rest), st.booleans())
def test_any_bytes_are_read_or_malformed_and_nothing_else(data, is_v5):
    if is_v5:
        data = data.replace(b"\x23", b"\x26")

    assert read_all(data, is_v5=is_v5) == naively(data, is_v5=is_v5)


def test_variable_lengths_need_not_be_short():
    """0x80 0x00 is 0 as well: the standard forbids it, and a reader that took it for two packets would be lost."""
    data = b"\x32\x86\x00" + text(b"a") + b"\x00\x01\x00" + stream(B)

    assert variable(6) == b"\x06"
    assert read_all(data, is_v5=True)[0][0][:2] == (b"a", b"")
    assert len(read_all(data, is_v5=True)[0]) == 2
