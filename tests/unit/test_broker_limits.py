"""What the broker says it has dropped, and what it grants less of than was asked: without a broker."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import structlog
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from mqtt_bridge.broker_limits import ASK_AFTER_S, DROPPED, TELL_EVERY_S, DropWatch, shortfalls
from mqtt_bridge.model import Run
from mqtt_bridge.settings import Settings
from mqtt_bridge.subscriber import STEADY_S

FILTERS = ("devices/+/telemetry",)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Link:
    """Stands in for the connection: hands out packet ids, and remembers what was subscribed to."""

    def __init__(self) -> None:
        self.subscribed: list[str] = []

    def subscribe(self, topic: str) -> tuple[int, int]:
        self.subscribed.append(topic)
        return 0, len(self.subscribed)


def takes(watch: DropWatch, run: Run) -> bool:
    """Whether nothing of the run is left to others."""
    return not list(watch.sift(run))


def count_of(payload: bytes, *, topic: str = DROPPED, qos: int = 0) -> Run:
    return Run.of_one(topic.encode(), payload, qos, retain=True, packet_id=7 if qos else 0)


def suback(name: str) -> list[ReasonCode]:
    return [ReasonCode(PacketTypes.SUBACK, name)]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def link() -> Link:
    return Link()


def asked(clock: Clock, link: Link, watch: DropWatch) -> DropWatch:
    """Let so much time pass that the watch has asked."""
    watch.tend(link.subscribe)
    clock.now_s += ASK_AFTER_S
    watch.tend(link.subscribe)
    return watch


# --- Asking ---


def test_it_asks_once_a_connection_and_some_time_after_the_real_subscription(clock, link):
    watch = DropWatch(FILTERS, clock=clock)

    watch.tend(link.subscribe)
    clock.now_s += ASK_AFTER_S - 0.01
    watch.tend(link.subscribe)
    assert link.subscribed == []
    asked(clock, link, watch)
    asked(clock, link, watch)

    assert link.subscribed == [DROPPED]


def test_it_asks_so_late_that_a_broker_which_ends_the_connection_over_it_does_not_look_contested():
    assert ASK_AFTER_S > STEADY_S


def test_it_asks_again_on_the_next_connection(clock, link):
    watch = asked(clock, link, DropWatch(FILTERS, clock=clock))
    watch.answered(1, suback("Granted QoS 0"))

    watch.ended(cut=True)
    asked(clock, link, watch)

    assert link.subscribed == [DROPPED, DROPPED]


def test_a_refusal_is_not_asked_for_twice(clock, link):
    watch = asked(clock, link, DropWatch(FILTERS, clock=clock))

    assert watch.answered(1, suback("Not authorized"))
    watch.ended(cut=True)
    asked(clock, link, watch)

    assert link.subscribed == [DROPPED]
    assert (watch.dropped, watch.finished) == (None, True)


def test_a_broker_that_ends_the_connection_in_answer_is_not_asked_again(clock, link):
    watch = asked(clock, link, DropWatch(FILTERS, clock=clock))

    watch.ended(cut=True)
    asked(clock, link, watch)

    assert link.subscribed == [DROPPED]


def test_a_connection_that_we_end_ourselves_says_nothing_about_the_broker(clock, link):
    watch = asked(clock, link, DropWatch(FILTERS, clock=clock))

    watch.ended(cut=False)
    watch.ended(cut=True)
    asked(clock, link, watch)

    assert link.subscribed == [DROPPED, DROPPED]


def test_the_answer_to_another_subscription_is_not_its_own(clock, link):
    watch = asked(clock, link, DropWatch(FILTERS, clock=clock))

    assert not watch.answered(77, suback("Not authorized"))
    assert watch.answered(1, suback("Granted QoS 0"))


def test_one_that_does_not_ask_keeps_the_count_from_the_pipeline_all_the_same(clock, link):
    watch = asked(clock, link, DropWatch(FILTERS, asks=False, clock=clock))

    assert link.subscribed == []
    assert takes(watch, count_of(b"5"))


# --- Whose message it is ---


@pytest.mark.parametrize(
    ("filters", "publish", "taken"),
    [
        (FILTERS, count_of(b"1"), True),
        (("#",), count_of(b"1"), True),  # a wildcard in first place brings no $SYS
        (("$SYS/#",), count_of(b"1"), False),
        (("$SYS/broker/+/messages/#",), count_of(b"1"), False),
        ((DROPPED,), count_of(b"1", qos=1), False),
        (FILTERS, count_of(b"1", qos=1), False),  # it has to be acknowledged in its turn
        (FILTERS, count_of(b"1", topic="devices/d1/telemetry"), False),
        (FILTERS, count_of(b"nonsense"), True),
    ],
)
def test_the_pipeline_gets_the_count_only_where_the_user_subscribes_to_it(filters, publish, taken):
    assert takes(DropWatch(filters), publish) is taken


def test_where_the_user_subscribes_to_it_the_count_is_read_on_the_way_and_not_asked_for_twice(clock, link):
    watch = asked(clock, link, DropWatch(("$SYS/#",), clock=clock))

    takes(watch, count_of(b"12", qos=1))

    assert (link.subscribed, watch.dropped) == ([], 12)


@pytest.mark.parametrize("payload", [b"", b"-1", b"1.5", b"many", b"\xff", "٣".encode()])
def test_what_is_no_number_is_not_believed(payload):
    watch = DropWatch(FILTERS)
    takes(watch, count_of(b"4"))

    takes(watch, count_of(payload))

    assert watch.dropped == 4


def test_an_endless_number_does_no_harm():
    watch = DropWatch(FILTERS)

    takes(watch, count_of(b"9" * 10_000))

    assert watch.dropped == 10**18 - 1


# --- Warning ---


def warned(watch: DropWatch, link: Link) -> list[int]:
    with structlog.testing.capture_logs() as logs:
        watch.tend(link.subscribe)
    return [entry["dropped"] for entry in logs if entry["log_level"] == "warning"]


def test_what_was_dropped_before_we_came_is_no_news(clock, link):
    watch = DropWatch(FILTERS, clock=clock)

    takes(watch, count_of(b"1000"))

    assert warned(watch, link) == []


def test_an_increase_is_told_with_how_many(clock, link):
    watch = DropWatch(FILTERS, clock=clock)

    for payload in (b"1000", b"1000", b"1003", b"1010"):
        takes(watch, count_of(payload))

    assert warned(watch, link) == [10]
    assert warned(watch, link) == []


def test_more_is_told_once_a_minute_also_when_no_further_count_comes(clock, link):
    watch = DropWatch(FILTERS, clock=clock)
    takes(watch, count_of(b"0"))
    takes(watch, count_of(b"1"))
    assert warned(watch, link) == [1]

    takes(watch, count_of(b"3"))
    assert warned(watch, link) == []
    clock.now_s += TELL_EVERY_S

    assert warned(watch, link) == [2]


def test_a_broker_that_counts_anew_after_a_restart_has_dropped_all_that_it_says(clock, link):
    watch = DropWatch(FILTERS, clock=clock)
    takes(watch, count_of(b"1000"))

    takes(watch, count_of(b"0"))
    assert warned(watch, link) == []
    takes(watch, count_of(b"4"))

    assert warned(watch, link) == [4]
    assert watch.dropped == 4


# --- What CONNACK grants ---


@pytest.mark.parametrize(
    ("granted", "level", "said"),
    [
        ({"SessionExpiryInterval": 60}, "warning", "granted_s=60"),
        ({"MaximumQoS": 0}, "warning", "QoS 1"),
        ({"RetainAvailable": 0}, "warning", "retained"),
        ({"SharedSubscriptionAvailable": 0}, "problem", "MQTT_SHARED_GROUP"),
        ({"WildcardSubscriptionAvailable": 0}, "problem", "MQTT_TOPICS"),
    ],
)
def test_what_is_granted_short_is_named_with_its_remedy(granted, level, said):
    settings = Settings(mqtt_shared_group="bridges")

    [found] = shortfalls(settings, FILTERS, SimpleNamespace(**granted))

    assert found.level == level
    assert said in str(found)


@pytest.mark.parametrize(
    "granted",
    [
        {},
        {"SessionExpiryInterval": 604_800, "MaximumQoS": 1, "RetainAvailable": 1},
        {"ReceiveMaximum": 1},
        {"SharedSubscriptionAvailable": 0},
    ],
)
def test_what_the_bridge_does_not_need_is_not_missed(granted):
    assert list(shortfalls(Settings(), FILTERS, SimpleNamespace(**granted))) == []


def test_topics_without_wildcards_need_none():
    granted = SimpleNamespace(WildcardSubscriptionAvailable=0)

    assert list(shortfalls(Settings(), ["a/b"], granted)) == []


def test_mqtt_3_1_1_grants_nothing_and_so_nothing_short():
    assert list(shortfalls(Settings(mqtt_shared_group="g"), FILTERS, None)) == []
