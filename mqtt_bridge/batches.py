"""From messages to a batch: what each of them means, translated and counted, in parts of a bounded number of rows.

Invariant: every message of a part is in exactly one place: among the translated, the dead letters, or the ignored.

Threads: none of its own. Workers and drainer make `Work` side by side, each its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from mqtt_bridge.errors import MessageError
from mqtt_bridge.ledger import Entry
from mqtt_bridge.model import DeadLetter, Message, Table, Tally, Translation
from mqtt_bridge.readings import Readings
from mqtt_bridge.transactions import Batch

log = structlog.get_logger(__name__)

TRANSACTION_ROWS = 50_000
"""A batch of messages with very many values is stored in several transactions of about so many rows."""


_UNWANTED = Translation("", Table("", ()), (), "retained")


class Translator(Protocol):
    """What is needed of the router."""

    def translate(self, message: Message, tally: Tally) -> Translation:
        """The rows of `message`, or `MessageError`."""


@dataclass(frozen=True, slots=True)
class Work:
    """Messages in the hands of one thread, and what they mean."""

    messages: list[Message] = field(default_factory=list)
    translated: list[tuple[Message, Translation]] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    @property
    def is_needless(self) -> bool:
        """Whether there is nothing to store: everything was ignored."""
        return not self.translated and not self.dead_letters

    def batch(self, entry: Entry, *also: Entry) -> Batch:
        """The batch that is stored under the key of `entry`, or under several."""
        return Batch(entry, self.translated, self.dead_letters, self.messages, also)


class Batches:
    """Makes work of messages, with the help of a router."""

    def __init__(self, translator: Translator) -> None:
        self._translator = translator

    def parts(self, messages: Iterable[Message]) -> Iterator[Work]:
        """What is to be stored of `messages`, in parts of a bounded number of rows."""
        work, rows = Work(), 0
        for message in messages:
            rows += self._add(message, work)
            if rows >= TRANSACTION_ROWS:
                yield work
                work, rows = Work(), 0
        if work.messages:
            yield work

    def whole(self, messages: Iterable[Message]) -> Work:
        """All of it in one part: what has a key already cannot be divided any more."""
        work = Work()
        for message in messages:
            self._add(message, work)
        return work

    def _add(self, message: Message, work: Work) -> int:
        """Add one message to `work`; how many rows it has. One that is ignored is only counted, in the tally."""
        work.messages.append(message)
        try:
            translation = self._translator.translate(message, work.tally) if not message.unwanted else _UNWANTED
        except MessageError as error:
            work.dead_letters.append(DeadLetter(message, error.route, error.stage, error.reason))
            return 0
        except Exception as error:  # a bug in a decoder costs this message, not the stream
            log.exception("a message could not be decoded for an unforeseen reason", topic=message.topic)
            reason = f"unforeseen {type(error).__name__}: {error}"
            work.dead_letters.append(DeadLetter(message, None, "decode", reason))
            return 0
        if translation.ignored is not None:
            work.tally.ignore(translation.ignored)
            return 0
        work.translated.append((message, translation))
        rows = translation.rows
        return rows.size if type(rows) is Readings else len(rows)  # a call less
