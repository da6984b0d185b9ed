"""Retained messages: which filters still need theirs, and which replays are not wanted.

A broker keeps the last retained message of every topic, and replays them to whoever subscribes (MQTT 5, section
3.3.1.3; the same in 3.1.1). Only a replay has the retain flag set. `MQTT_RETAINED=once` stores the replays of a filter
once: MQTT 5 can ask for none, MQTT 3.1.1 sends them with each SUBSCRIBE, where they are told by their topic.

A filter counts as *stored* when its replays are surely done with, for from then on they are not asked for, or ignored.
Until then a crash may store them again, never lose them. The sign: SUBACK was seen, no replay has come for `QUIET_S`,
and a barrier that was sent after that was answered while the broker held (next to) nothing unacknowledged: a broker
whose window has room has nothing queued. The tender waits until what was received by then is durable as well
(`Pipeline.holds_replays`), and writes it down.

Threads: the network thread, but for `load` (before it runs), and `remembering` and `remembered` (the tender's).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Self

from mqtt_bridge.settings import Settings
from mqtt_bridge.topics import covers

QUIET_S = 10.0
"""No replay for so long after SUBACK, and after the last replay: some brokers send them at their leisure."""
SMALLEST_WINDOW = 10
"""Messages that every broker sends ahead of their acknowledgements, where it was not seen to send fewer."""

Policy = Literal["once", "always", "never"]

_ALWAYS, _IF_NEW, _NEVER = 0, 1, 2
"""Retain Handling (MQTT 5, section 3.8.3.1)."""


class Remembered(NamedTuple):
    """What the database remembers of the retained messages of filters (`owners.retained_seen`)."""

    stored: frozenset[str] = frozenset()
    """Filters whose retained messages were stored."""
    withheld: frozenset[str] = frozenset()
    """Filters that are subscribed to without their retained messages (`never`), and have not been stored since."""

    @classmethod
    def parse(cls, text: str | None) -> Self:
        """From a line for each filter: `stored a/+` or `withheld b/#`. Other lines say nothing."""
        lines = [line.partition(" ") for line in (text or "").split("\n")]
        stored = frozenset(name for state, _, name in lines if state == "stored")
        return cls(stored, frozenset(name for state, _, name in lines if state == "withheld") - stored)

    def __str__(self) -> str:
        lines = [f"stored {name}" for name in sorted(self.stored)]
        return "\n".join(lines + [f"withheld {name}" for name in sorted(self.withheld)])

    def among(self, filters: frozenset[str]) -> Remembered:
        """What is remembered of these."""
        return Remembered(self.stored & filters, self.withheld & filters)


class Retained:
    """Follows the replays of `filters` through the connections of one process."""

    def __init__(
        self,
        filters: Iterable[str],
        *,
        policy: Policy,
        is_v5: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`filters`: without those of a shared subscription, whose replays are not asked for."""
        self._filters = frozenset(filters)
        self._policy = policy
        self._is_v5 = is_v5
        self._clock = clock
        self.remembered = Remembered()
        """What the database knows."""
        self._granted: frozenset[str] = frozenset()  # by SUBACK, to this process, in the present session
        self._awaited: frozenset[str] = frozenset()  # those of them whose replays may still come
        self._done: frozenset[str] = frozenset()  # those whose replays have all come
        self._unwanted: frozenset[str] = frozenset()  # those that had been stored when SUBSCRIBE was sent
        self._last_s = clock()  # of SUBACK, or of the last replay
        self._probed_s = clock()  # when the barrier under way was sent
        self._most_held = 0  # unacknowledged at the broker, as far as this connection has seen: its window has room

    @classmethod
    def of(cls, settings: Settings, filters: Iterable[str]) -> Self:
        """As the settings ask.

        A shared subscription is sent no replays (MQTT 5, section 4.8.2). Mosquitto 2.0 sends them all the same, to
        every member of the group.
        """
        followed = () if settings.mqtt_shared_group else filters
        return cls(followed, policy=settings.mqtt_retained, is_v5=settings.mqtt_protocol == "5")

    def load(self, remembered: Remembered) -> None:
        """Begin with what the database knows. A filter that is not configured any more is forgotten."""
        self.remembered = remembered.among(self._filters)
        self._unwanted = self.remembered.stored  # replays of an earlier process may come before our SUBSCRIBE

    # -- the network thread

    def connected(self, *, session_present: bool) -> None:
        """A connection begins: what the broker has queued for us comes first."""
        if not session_present:
            self._granted = self._awaited = frozenset()
        self._last_s = self._clock()
        self._most_held = 0

    def subscribing(self) -> None:
        """SUBSCRIBE is sent now: over MQTT 3.1.1 it brings the replays of every filter, also of stored ones."""
        self._unwanted = self.remembered.stored

    def handling(self, topic_filter: str) -> int:
        """The Retain Handling for this filter, over MQTT 5.

        `_IF_NEW` is right where this filter, if the session has it at all, was subscribed to with its replays: they
        were stored, or are queued in the session.
        """
        if self._policy == "never" or topic_filter not in self._filters:
            return _NEVER
        if self._policy == "always":
            return _ALWAYS
        if topic_filter in self.remembered.stored:
            return _NEVER
        return _ALWAYS if topic_filter in self.remembered.withheld - self._granted else _IF_NEW

    def granted(self, filters: Iterable[str]) -> None:
        """SUBACK: the broker has taken these filters; replays have come before, or come now."""
        self._granted |= self._filters.intersection(filters)
        self._awaited = self._granted - self.remembered.stored - self._done
        self._last_s = self._clock()

    def wants(self, topic: bytes) -> bool:
        """Whether a replay that arrives now is to be stored."""
        self._last_s = self._clock()
        if self._policy != "once":
            return self._policy == "always"
        if self._is_v5:
            return True  # it was asked for
        name = topic.decode("utf-8", "surrogateescape")
        return not any(covers(topic_filter, name) for topic_filter in self._unwanted)

    @property
    def due(self) -> bool:
        """Whether replays may be over, and a barrier is needed to know."""
        return bool(self._awaited) and self._policy != "never" and self._clock() - self._last_s >= QUIET_S

    def probe(self) -> None:
        """A barrier is sent now."""
        self._probed_s = self._clock()

    def probed(self, held: int) -> None:
        """It was answered. When the broker answered it held `held` messages unacknowledged, all of them received."""
        quiet = self._probed_s - self._last_s >= QUIET_S
        if self._awaited and quiet and held < max(1, min(self._most_held, SMALLEST_WINDOW)):
            self._done |= self._awaited
            self._awaited = frozenset()
        self._most_held = max(self._most_held, held)

    # -- the tender

    def remembering(self) -> Remembered:
        """What the database should remember, once all replays that were received are durable.

        That replays are withheld should be known before SUBSCRIBE: later it cannot be told from a subscription whose
        replays are queued.
        """
        stored, withheld = self.remembered
        if self._policy == "never":
            return Remembered(stored, self._filters - stored)
        return Remembered(stored | self._done, withheld - self._done)
