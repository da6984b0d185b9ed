"""From a message to rows: which route takes the topic, and what that route makes of the payload.

The first route whose pattern matches takes a message. Matching is done once for a topic and remembered, in a bounded
dict; from then on a message costs one lookup, its decoder, and one loop over its values. A message that cannot be
translated raises MessageError and nothing else, whatever its bytes. Worker threads share one Router: the dict is all
that changes, by single operations that are atomic, and two threads that race find the same match.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mqtt_bridge.decoders import FORMATS, Decoder, json, times
from mqtt_bridge.decoders.values import MAX_NAME_BYTES, Narrow, Repair, RoundedInteger, is_short_name
from mqtt_bridge.errors import MessageError
from mqtt_bridge.model import READINGS_COLUMNS, Message, Table, Tally, Translation
from mqtt_bridge.readings import Readings
from mqtt_bridge.topics import TopicPattern, covers

READINGS = Table("readings", READINGS_COLUMNS)

_new = tuple.__new__  # half the price of Translation(...), for what is made once a message

MAX_VALUES = 10_000
MAX_DEPTH = 64

# Together they bound the remembered matches to some 100 MB, were every topic that long.
_MAX_REMEMBERED = 50_000
_MAX_REMEMBERED_TOPIC_BYTES = 500


@dataclass(frozen=True, slots=True)
class Route:
    """What to do with the messages of some topics.

    The captures `device` and `metric` of its pattern name the device (else: the whole topic) and the metric of
    payloads that are a single value (else: the last level of the topic).
    """

    name: str
    pattern: TopicPattern
    format: str = "auto"
    """A name of `decoders.FORMATS`."""
    table: Table = READINGS


def default_routes(topics: str) -> tuple[Route, ...]:
    """The routes that `MQTT_TOPICS` means, a comma separated list of patterns; ValueError where one is no pattern."""
    texts = filter(None, map(str.strip, topics.split(",")))
    return tuple(
        Route("default" if number == 1 else f"default-{number}", TopicPattern.parse(text))
        for number, text in enumerate(texts, start=1)
    )


@dataclass(frozen=True, slots=True)
class _Match:
    """What is known about a topic: its route and, drawn from both, how to read its payloads."""

    route: Route
    decode: Decoder
    shape: Narrow

    def read(self, document: Any, received_us: int, repairs: list[Repair]) -> Readings:
        """The rows of a document. The repairs count only if the whole of it is read."""
        time_us = times.take(document, received_us, repairs) if type(document) is dict else received_us
        return self.shape.rows(document, time_us, repairs)


class Router:
    """Translates messages by the first route that matches their topic."""

    def __init__(self, routes: Sequence[Route], *, max_values: int = MAX_VALUES, max_depth: int = MAX_DEPTH) -> None:
        self.routes = tuple(routes)
        self.filters = _without_covered(route.pattern.filter for route in self.routes)
        """What to subscribe to: the filters of all routes, but for those that another covers."""
        self._max_values = max_values
        self._max_depth = max_depth
        self._matches: dict[bytes, _Match | Translation] = {}
        self._names: dict[str, bytes] = {}

    def translate(self, message: Message, tally: Tally) -> Translation:
        """The rows of a message, or why it has none; adds to the tally what had to be repaired.

        Raises MessageError when the message cannot be stored: stage `route` or `decode`, with the route's name
        where there is one.
        """
        match = self._matches.get(message.topic) or self._find(message.topic)
        if isinstance(match, Translation):
            return match
        repairs: list[Repair] = []
        try:
            try:
                rows = match.read(match.decode(message.payload), message.received_us, repairs)
            except RoundedInteger:
                repairs.clear()
                rows = match.read(json.exact(message.payload), message.received_us, repairs)
            except RecursionError as error:  # where max_depth is set beyond what Python's stack holds
                raise MessageError("The payload is nested too deeply.") from error
        except MessageError as error:
            error.route = match.route.name
            raise
        if repairs:
            tally.repair(repairs)
        route = match.route
        return _new(Translation, (route.name, route.table, rows, None if rows.size else "no_values"))

    def _find(self, topic: bytes) -> _Match | Translation:
        """The match of a topic, or the translation of all its messages when it is ignored."""
        match = self._first_match(_characters(topic))
        if len(topic) <= _MAX_REMEMBERED_TOPIC_BYTES:
            if len(self._matches) >= _MAX_REMEMBERED:
                self._matches.clear()  # crude, but a match is found again in microseconds
            self._matches[topic] = match
        return match

    def _first_match(self, topic: str) -> _Match | Translation:
        for route in self.routes:
            captures = route.pattern.match(topic)
            if captures is not None:
                return self._match(route, topic, captures)
        # Nobody asked for this topic where a filter had to be wider than its pattern: nothing is wrong with it.
        for route in self.routes:
            if not route.pattern.exact and covers(route.pattern.filter, topic):
                return Translation(route.name, route.table, [], "no_route")
        raise MessageError("No route matches the topic.", stage="route")

    def _match(self, route: Route, topic: str, captures: dict[str, str]) -> _Match:
        device = captures.get("device", topic)
        if not is_short_name(device):
            reason = f"The device {device[:40]!r}... is longer than {MAX_NAME_BYTES:,} bytes."
            raise MessageError(reason, stage="route", route=route.name)
        metric = captures["metric"].replace("/", ".") if "metric" in captures else _last_level(topic)
        shape = Narrow(device, metric, max_values=self._max_values, max_depth=self._max_depth, names=self._names)
        return _Match(route, FORMATS[route.format], shape)


def _without_covered(filters: Iterable[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for candidate in filters:
        if not any(covers(other, candidate) for other in kept):
            kept = [other for other in kept if not covers(candidate, other)] + [candidate]
    return tuple(kept)


def _characters(topic: bytes) -> str:
    try:
        characters = topic.decode()
    except UnicodeDecodeError as error:
        reason = f"The topic is not UTF-8: byte 0x{topic[error.start]:02x} at position {error.start}."
        raise MessageError(reason, stage="route") from error
    if "\0" in characters:
        reason = f"The topic has a NUL character at position {characters.index(chr(0))}, which MQTT forbids."
        raise MessageError(reason, stage="route")
    return characters


def _last_level(topic: str) -> str:
    """The last level that is not empty: `a/b/` means `b`."""
    return topic.rstrip("/").rpartition("/")[2] or topic
