"""What was published against what is stored, message by message, and in which order: pure functions.

Of identical messages only the number can be compared: one lost and one stored twice would balance. Cyclic payloads
have that blind spot only between messages that are exactly a cycle apart, and are as hard to tell apart for the bridge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.chaos.publisher import END, reading
from tests.chaos.schedule import Parameters
from tests.chaos.store import Row


@dataclass(frozen=True, slots=True)
class Comparison:
    """Messages published against messages stored."""

    stored: int
    """Every copy counted; without the last messages."""
    lost: int
    """Published with QoS 1, and not stored."""
    duplicated: int
    """Copies beyond the first, whatever the QoS."""
    different: int
    """Stored, but never published like that; dead letters too."""
    qos0_lost: int
    """Published with QoS 0, and not stored: expected wherever the bridge was away."""
    displacement: int | None
    """Messages between one that was stored too early and the one of its device that should have come before, at
    most, in the order of their publication; None where messages cannot be told apart."""
    examples: tuple[str, ...] = ()
    """Some of what is wrong, for whoever looks for the cause."""


def compare(
    rows: Sequence[Row], parameters: Parameters, *, published: int, ended: int, dead_letters: Counter[str]
) -> Comparison:
    """`rows` in the order in which they became visible; `ended` of the last messages were published."""
    acknowledged, unacknowledged = _expected(parameters, published=published, ended=ended)
    stored = Counter(rows)
    lost = acknowledged - stored
    excess = stored - acknowledged - unacknowledged
    duplicated = Counter({row: n for row, n in excess.items() if row in acknowledged or row in unacknowledged})
    different = excess - duplicated
    examples = {"lost": lost, "twice": duplicated, "different": different, "dead letter": dead_letters}
    return Comparison(
        stored=sum(count for row, count in stored.items() if row[0] != END),
        lost=lost.total(),
        duplicated=duplicated.total(),
        different=different.total() + dead_letters.total(),
        qos0_lost=(unacknowledged - stored).total(),
        displacement=displacement(rows) if parameters.payload == "unique" else None,
        examples=tuple(f"{name} {row}" for name, found in examples.items() for row in list(found)[:20]),
    )


def _expected(parameters: Parameters, *, published: int, ended: int) -> tuple[Counter[Row], Counter[Row]]:
    """What QoS 1 must have stored, and what QoS 0 may have."""
    expected: tuple[Counter[Row], Counter[Row]] = (Counter(), Counter())
    for number in range(published):
        device, value, qos = reading(number, parameters)
        expected[0 if qos else 1][device, "seq", float(value)] += 1
    for number in range(ended):
        expected[0][END, "seq", float(number)] += 1
    return expected


def displacement(rows: Iterable[Row]) -> int:
    """How far behind a later message of its device a message was stored, at most: 0 where all came in order."""
    newest: dict[str, float] = {}
    largest = 0.0
    for device, _, value in rows:
        if value is not None:
            largest = max(largest, newest.get(device, value) - value)
            newest[device] = max(newest.get(device, value), value)
    return int(largest)
