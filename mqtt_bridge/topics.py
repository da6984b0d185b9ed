"""Topic patterns: MQTT topic filters whose levels may have names.

`devices/{device}/telemetry` subscribes to `devices/+/telemetry` and calls the second level `device`; `{path...}`
stands for one or more levels; plain `+` and `#` mean what they mean in MQTT (OASIS MQTT 5.0, section 4.7). A pattern
matches no topic that its filter does not deliver; where the filter delivers more than the pattern matches, `exact`
says so. Pure functions and immutable values: any thread may use them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import zip_longest

MAX_FILTER_BYTES = 65_535
"""Longest UTF-8 string MQTT can carry [MQTT-4.7.3-3]."""

_CAPTURE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(\.\.\.)?\}")


@dataclass(frozen=True, slots=True)
class TopicPattern:
    """A topic filter with names for some of its levels. Made by `parse`."""

    text: str
    """The pattern as written."""
    filter: str
    """What to subscribe to: `{x}` is `+`; from `{x...}` on everything is `#`."""
    captures: tuple[str, ...]
    """Names of the captures, in the order of the pattern."""
    exact: bool
    """False when the filter delivers topics that the pattern does not match (`a/#` for `a/{x...}/b`)."""
    _regex: re.Pattern[str] = field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> TopicPattern:
        """Read a pattern; ValueError with one clear sentence when it is none."""
        _check_text(text)
        levels = text.split("/")
        for position, level in enumerate(levels):
            _check_level(level, last=position == len(levels) - 1)
        captures = _captures(levels)
        _check_captures(levels, captures)
        topic_filter = _filter(levels)
        _check_length(topic_filter)
        return cls(text, topic_filter, captures, _is_exact(levels), re.compile(_regex(levels), re.DOTALL))

    def match(self, topic: str) -> dict[str, str] | None:
        """The captures when the topic matches, `{x...}` with its levels joined by `/`; else None."""
        found = self._regex.fullmatch(topic)
        return found.groupdict() if found else None


def covers(topic_filter: str, other: str) -> bool:
    """Whether the first filter delivers every topic that the other delivers."""
    if _hides_dollar(topic_filter, other):
        return False
    levels, others = _levels(topic_filter), _levels(other)
    for level, other_level in zip(levels, others, strict=False):
        if level == "#":
            return True
        if other_level == "#" or level not in ("+", other_level):
            return False
    return len(levels) == len(others) or levels[len(others) :] == ["#"]


def overlaps(topic_filter: str, other: str) -> bool:
    """Whether there is a topic that both filters deliver."""
    if _hides_dollar(topic_filter, other) or _hides_dollar(other, topic_filter):
        return False
    levels, others = topic_filter.split("/"), other.split("/")
    for level, other_level in zip(levels, others, strict=False):
        if "#" in (level, other_level):
            return True
        if level != other_level and "+" not in (level, other_level):
            return False
    shorter, longer = sorted((levels, others), key=len)
    return len(shorter) == len(longer) or longer[len(shorter) :] == ["#"]


def covering(topic_filter: str, other: str) -> str:
    """The narrowest filter that delivers all that either of two overlapping filters delivers."""
    parts: list[str] = []
    for level, other_level in zip_longest(topic_filter.split("/"), other.split("/"), fillvalue="#"):
        if "#" in (level, other_level):
            return "/".join([*parts, "#"])
        parts.append(level if level == other_level else "+")
    return "/".join(parts)


def _check_text(text: str) -> None:
    if not text:
        raise ValueError("A topic must not be empty.")
    if "\0" in text:
        raise ValueError("A topic must not contain NUL characters.")
    if text.startswith("$share/"):
        raise ValueError("A topic must not begin with $share/: shared subscriptions are set by MQTT_SHARED_GROUP.")


def _check_level(level: str, *, last: bool) -> None:
    if level in ("+", "#"):
        if level == "#" and not last:
            raise ValueError("# stands for all remaining levels and must be the last level.")
    elif "{" in level or "}" in level:
        _check_capture(level)
    elif "+" in level or "#" in level:
        raise ValueError(f"The level {level!r} mixes a wildcard with text: + and # must stand alone in their level.")


def _check_capture(level: str) -> None:
    if level.count("{") != level.count("}"):
        raise ValueError(f"The level {level!r} has unbalanced braces.")
    if not _CAPTURE.fullmatch(level):
        raise ValueError(
            f"The level {level!r} is not a capture: it must be {{name}} or {{name...}} and fill its level,"
            " the name made of letters, digits and underscores."
        )


def _captures(levels: list[str]) -> tuple[str, ...]:
    return tuple(found[1] for level in levels if (found := _CAPTURE.fullmatch(level)))


def _check_captures(levels: list[str], captures: tuple[str, ...]) -> None:
    repeated = sorted({name for name in captures if captures.count(name) > 1})
    if repeated:
        raise ValueError(f"The capture {{{repeated[0]}}} stands twice: give every capture its own name.")
    if sum(_takes_many(level) for level in levels) > 1:
        raise ValueError("Only one {name...} or # may stand in a topic: how levels divide among two is ambiguous.")


def _takes_many(level: str) -> bool:
    return level == "#" or level.endswith("...}")


def _takes_any(level: str) -> bool:
    return level in ("+", "#") or level.startswith("{")


def _filter(levels: list[str]) -> str:
    parts = []
    for level in levels:
        if _takes_many(level):
            parts.append("#")
            break
        parts.append("+" if _takes_any(level) else level)
    return "/".join(parts)


def _check_length(topic_filter: str) -> None:
    try:
        length = len(topic_filter.encode())
    except UnicodeEncodeError:
        raise ValueError("A topic must be valid UTF-8.") from None
    if length > MAX_FILTER_BYTES:
        raise ValueError(f"The topic filter is {length} bytes long; MQTT allows {MAX_FILTER_BYTES}.")


def _is_exact(levels: list[str]) -> bool:
    # `a/#` also delivers `a`, which `a/{x...}` does not match; `#` alone delivers nothing shorter than one level.
    return levels[-1] == "#" or len(levels) == 1 or not any(map(_takes_many, levels))


def _regex(levels: list[str]) -> str:
    # A wildcard in first place matches no topic that begins with $ [MQTT-4.7.2-1].
    guard = r"(?!\$)" if _takes_any(levels[0]) else ""
    if levels[-1] != "#":
        return guard + "/".join(map(_level_regex, levels))
    if len(levels) == 1:
        return guard + ".*"
    return guard + "/".join(map(_level_regex, levels[:-1])) + "(?:/.*)?"


def _level_regex(level: str) -> str:
    if capture := _CAPTURE.fullmatch(level):
        return f"(?P<{capture[1]}>{'.*' if capture[2] else '[^/]*'})"
    return "[^/]*" if level == "+" else re.escape(level)


def _hides_dollar(topic_filter: str, other: str) -> bool:
    """Whether the first filter cannot deliver the other's topics, because they begin with $ [MQTT-4.7.2-1]."""
    return topic_filter[:1] in ("+", "#") and other.startswith("$")


def _levels(topic_filter: str) -> list[str]:
    # Every topic has a first level, so these two are the same; deeper down, `a/#` delivers `a` and `a/+/#` does not.
    return ["#"] if topic_filter == "+/#" else topic_filter.split("/")
