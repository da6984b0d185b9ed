"""What the broker will not do for us: what it says it has dropped, and what it grants less of than was asked.

A broker that is full throws the newest messages away and tells their publishers that all is well. Its limits cannot
be asked over MQTT, but Mosquitto counts what it drops, for all clients together, in a `$SYS` topic.

Invariants: the watch has a SUBSCRIBE of its own, so that a broker which refuses it refuses nothing else; a broker that
ends the connection over it is not asked again by this process; what it reads never reaches the pipeline, unless the
user subscribes to it as well.

Threads: all in the subscriber's, but for `dropped`, a single reference that anybody may read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import structlog
from paho.mqtt.reasoncodes import ReasonCode

from mqtt_bridge.model import Run
from mqtt_bridge.settings import Settings
from mqtt_bridge.topics import covers

log = structlog.get_logger(__name__)

DROPPED = "$SYS/broker/publish/messages/dropped"
"""Mosquitto's count since its start, retained, published every `sys_interval` (10 s) in which it has changed."""
ASK_AFTER_S = 10.0
"""After the real subscription: a broker that answers by ending the connection shall not look like a contested id."""
TELL_EVERY_S = 60.0
_DROPPED = DROPPED.encode()


class DropWatch:
    """The broker's count of dropped messages, over all connections of this process."""

    def __init__(
        self,
        filters: Sequence[str],
        *,
        asks: bool = True,
        ask_after_s: float = ASK_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`filters`: what the user subscribes to; where that brings the count anyway, it is read on the way.

        Without `asks` it only keeps away from the pipeline what an earlier process has subscribed the session to.
        """
        self._read_on_the_way = any(covers(name, DROPPED) for name in filters)
        self._may_ask = asks and not self._read_on_the_way
        self._ask_after_s = ask_after_s
        self._clock = clock
        self._ask_at_s: float | None = None  # on this connection; None until its subscription is confirmed
        self._asked = False  # on this connection
        self._suback_for: int | None = None
        self._untold = 0
        self._tell_at_s = clock()
        self.dropped: int | None = None
        """Messages that the broker has dropped since its start, of any client; None where that is not known."""

    # -- what the connection calls

    def tend(self, subscribe: Callable[[str], tuple[object, int | None]]) -> None:
        """Ask when it is time; called again and again while the real subscription is in place."""
        self._tell()
        if not self._may_ask or self._asked:
            return
        now_s = self._clock()
        if self._ask_at_s is None:
            self._ask_at_s = now_s + self._ask_after_s
        if now_s >= self._ask_at_s:
            self._asked = True
            _, self._suback_for = subscribe(DROPPED)

    def answered(self, packet_id: int, reasons: Sequence[ReasonCode]) -> bool:
        """Whether this SUBACK was for the watch."""
        if packet_id != self._suback_for:
            return False
        self._suback_for = None
        if any(reason.is_failure for reason in reasons):
            self._give_up("the broker does not let its count of dropped messages be read", reason=str(reasons[0]))
        return True

    def ended(self, *, cut: bool) -> None:
        """The connection is gone; `cut`: not by our own will. Idempotent."""
        if cut and self._suback_for is not None:
            self._give_up("the broker ended the connection when asked for its count of dropped messages; never again")
        self._suback_for = self._ask_at_s = None
        self._asked = False

    def sift(self, run: Run) -> Iterator[Run]:
        """What of `run` is the business of others than the watch: nearly always all of it."""
        if _DROPPED not in run.topics:
            yield run
            return
        for payload in (payload for topic, payload in zip(run.topics, run.payloads, strict=True) if topic == _DROPPED):
            if payload.isdigit():
                self._note(int(payload[:18]))
        # Of QoS 1 only where the user subscribes: such a message needs its place in the order of acknowledgements.
        if run.qos or self._read_on_the_way:
            yield run
        elif rest := [index for index, topic in enumerate(run.topics) if topic != _DROPPED]:
            yield run.only(rest)

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be learnt on this connection by waiting."""
        return self.dropped is not None or not self._may_ask

    # -- what comes of it

    def _give_up(self, why: str, **fields: object) -> None:
        self._may_ask = False
        log.debug(why, topic=DROPPED, **fields)

    def _note(self, dropped: int) -> None:
        if self.dropped is not None:
            # A broker that was restarted counts from 0: all that it says was dropped since.
            self._untold += dropped - self.dropped if dropped >= self.dropped else dropped
        self.dropped = dropped

    def _tell(self) -> None:
        if not self._untold or self._clock() < self._tell_at_s:
            return
        log.warning(
            "the broker drops messages: the queue of one of its clients, of this bridge or of any other, is full",
            dropped=self._untold,
            since_its_start=self.dropped,
            consequence="what was dropped for this bridge is lost, and its publishers were told that all is well",
            remedy="raise max_queued_messages and max_queued_bytes of the broker",
        )
        self._untold = 0
        self._tell_at_s = self._clock() + TELL_EVERY_S


# -- what CONNACK grants


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Something that the broker grants less of than the bridge needs."""

    sentence: str
    remedy: str
    level: Literal["warning", "problem"] = "warning"
    """`problem` where the subscription cannot succeed."""
    figures: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        figures = ", ".join(f"{name}={number}" for name, number in self.figures.items())
        return f"{self.sentence}{f' ({figures})' if figures else ''}. {self.remedy}"


def shortfalls(settings: Settings, filters: Sequence[str], properties: Any) -> Iterator[Shortfall]:
    """Compare what was asked with what CONNACK grants (MQTT 5, section 3.2.2.3); nothing over MQTT 3.1.1.

    Its Receive Maximum is none of them: it limits what a client publishes, and the bridge publishes nothing.
    """
    asked_s = settings.mqtt_session_expiry_s
    granted_s = getattr(properties, "SessionExpiryInterval", asked_s)
    if granted_s < asked_s:
        yield Shortfall(
            "the broker keeps the session for a shorter time than asked; what is published while the bridge is "
            "away for longer is lost",
            "Raise the broker's limit, or lower MQTT_SESSION_EXPIRY_S to what you accept.",
            figures={"asked_s": asked_s, "granted_s": granted_s},
        )
    if getattr(properties, "MaximumQoS", 2) < settings.mqtt_qos:
        yield Shortfall(
            "the broker does not offer QoS 1: messages may be lost", "Raise its limit, or live with MQTT_QOS=0."
        )
    if not getattr(properties, "RetainAvailable", 1):
        yield Shortfall(
            "the broker keeps no retained messages, and may cut off devices that publish them",
            "Allow them at the broker, or have the devices publish without the retain flag.",
        )
    if settings.mqtt_shared_group and not getattr(properties, "SharedSubscriptionAvailable", 1):
        yield Shortfall(
            "the broker does not offer shared subscriptions",
            "Allow them at the broker, or remove MQTT_SHARED_GROUP and run one bridge.",
            level="problem",
        )
    wildcards = [name for name in filters if "+" in name or "#" in name]
    if wildcards and not getattr(properties, "WildcardSubscriptionAvailable", 1):
        yield Shortfall(
            "the broker does not offer wildcards in subscriptions",
            "Allow them at the broker, or list every topic in MQTT_TOPICS.",
            level="problem",
        )
