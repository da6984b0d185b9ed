"""The values that travel through the bridge, in the order in which they appear.

A `Run` of packets comes in from the broker and becomes `Message`s, the routes turn each into a `Translation` (rows of
one table), and what cannot be translated or stored becomes a `DeadLetter`. Nobody changes them. They are tuples rather
than dataclasses because one of each is made for every message, and a tuple costs a third of a frozen dataclass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mqtt_bridge.errors import Stage

Row = tuple[Any, ...]
"""One row of a table, in the order of the table's columns. A time is an int: microseconds since 1970, UTC."""


Properties = Mapping[str, Any] | None
"""MQTT 5 properties of a message, as JSON can hold them; None where there are none."""


class Run(NamedTuple):
    """PUBLISH packets that came one right after another and have the same flags, as columns of the same length.

    Columns, for then nothing is made for a single packet, and whole columns are handled at the speed of C.
    """

    topics: list[bytes]
    payloads: list[bytes]
    packet_ids: list[int]
    """Zeros for QoS 0."""
    properties: list[Properties]
    qos: int
    retain: bool = False
    dup: bool = False

    @classmethod
    def of_one(
        cls,
        topic: bytes,
        payload: bytes,
        qos: int,
        *,
        retain: bool = False,
        dup: bool = False,
        packet_id: int = 0,
        properties: Properties = None,
    ) -> Run:
        """A run of a single packet."""
        return cls([topic], [payload], [packet_id], [properties], qos, retain, dup)

    def only(self, indices: Sequence[int]) -> Run:
        """These packets of the run."""
        return self._replace(
            topics=[self.topics[index] for index in indices],
            payloads=[self.payloads[index] for index in indices],
            packet_ids=[self.packet_ids[index] for index in indices],
            properties=[self.properties[index] for index in indices],
        )


class Message(NamedTuple):
    """One message to be stored: what a PUBLISH brought, with its arrival and its place in the session."""

    topic: bytes
    """Raw bytes: a topic that is not UTF-8 must reach the dead letters, not crash the receiver."""
    payload: bytes
    qos: int
    retain: bool
    received_us: int
    """Arrival at the bridge, microseconds since 1970, UTC."""
    position: int = 0
    """Unwrapped position in the MQTT session (see `ledger`); 0 for QoS 0, which has none."""
    fingerprint: bytes = b""
    """Eight bytes that recognise a redelivery (see `ledger`); empty for QoS 0."""
    properties: Properties = None
    unwanted: bool = False
    """A replay that is to be ignored (see `retained`): decided when it came, for what is wanted changes meanwhile."""


class Table(NamedTuple):
    """A table that rows are copied into: its name and the columns that rows fill, in order."""

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...] = ()
    """Columns of its natural key (see `natural_keys`); none where every row is a new one."""
    on_conflict: Literal["nothing", "update"] = "nothing"
    """What becomes of a row whose key is there already: it is left out, or it replaces the other."""


READINGS_COLUMNS = ("time", "device", "metric", "value", "value_text")
"""Columns of the narrow shape: `(time_us, device, metric, value or None, value_text or None)`."""


class Translation(NamedTuple):
    """What one message means: the rows to store, or the reason why it has none."""

    route: str
    table: Table
    rows: Collection[Row]
    ignored: str | None = None
    """Reason when the message is ignored on purpose (`no_values`, `no_route`, `retained` ...), else None."""


Translated = tuple[Message, Translation]
"""A message and what it means."""


class DeadLetter(NamedTuple):
    """A message that could not be stored, with everything needed to understand and to requeue it."""

    message: Message
    route: str | None
    stage: Stage
    error: str
    sqlstate: str | None = None


@dataclass(slots=True)
class Tally:
    """Counts of what was repaired or left out while messages were translated; one per batch, by one thread."""

    nan_skipped: int = 0
    """Values that were NaN or infinite, and therefore not stored."""
    nul_removed: int = 0
    """Texts from which NUL characters were removed (PostgreSQL cannot store them)."""
    time_replaced: int = 0
    """Implausible times that were replaced by the arrival time."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Ignored messages by reason."""

    def repair(self, repairs: Iterable[str]) -> None:
        """One message was stored with these repairs, each named like its count."""
        for repair in repairs:
            setattr(self, repair, getattr(self, repair) + 1)

    def ignore(self, reason: str) -> None:
        """One message was ignored for this reason."""
        self.ignored[reason] = self.ignored.get(reason, 0) + 1
