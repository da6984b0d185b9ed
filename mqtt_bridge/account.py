"""The account of messages: every message that was received is in exactly one place.

received = stored + duplicate + dead_lettered + ignored + spooled + dropped + in_flight

`in_flight` is not computed from the others: it is counted where the messages are, in the queue and in the workers'
hands. The pipeline holds its lock for every booking and for `balance`, so the account balances whenever it is read.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mqtt_bridge.model import Tally

Outcome = Literal["stored", "duplicate", "dead_lettered", "ignored", "spooled", "dropped"]
OUTCOMES: tuple[Outcome, ...] = ("stored", "duplicate", "dead_lettered", "ignored", "spooled", "dropped")

LATENCIES = 4_096
"""How many latencies the percentiles are taken from: the newest ones."""
SAMPLES_PER_BATCH = 16


@dataclass(frozen=True, slots=True)
class Balance:
    """The account at one moment."""

    received: int
    outcomes: dict[str, int]
    in_flight: int
    queue_depth: int
    queue_bytes: int
    oldest_us: int | None
    """Arrival of the oldest message in flight, microseconds since 1970; None when there is none."""
    rows: dict[str, int]
    """Rows stored, by table."""
    ignored: dict[str, int]
    """Ignored messages by reason."""
    dead_letters: dict[str, int]
    """Dead letters by stage."""
    repairs: dict[str, int]
    """Values skipped or repaired: nan_skipped, nul_removed, time_replaced."""
    batches: int
    latency_p50_s: float | None
    """Arrival to commit, of the newest messages (a sample of each batch); None before the first."""
    latency_p99_s: float | None

    @property
    def balanced(self) -> bool:
        """Whether every message received is in exactly one place."""
        return self.received == sum(self.outcomes.values()) + self.in_flight


class Account:
    """Counts since process start. Not locked: the pipeline calls it under its own lock."""

    def __init__(self) -> None:
        self.received = 0
        self.batches = 0
        self._outcomes: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._dead_letters: Counter[str] = Counter()
        self._repairs: Counter[str] = Counter()
        self._latencies_us: deque[int] = deque(maxlen=LATENCIES)

    def book(self, outcome: Outcome, count: int = 1) -> None:
        """`count` messages have reached their end as `outcome`."""
        self._outcomes[outcome] += count

    def book_tally(self, tally: Tally) -> None:
        """What was repaired and ignored while a batch was translated."""
        self._ignored.update(tally.ignored)
        self._repairs["nan_skipped"] += tally.nan_skipped
        self._repairs["nul_removed"] += tally.nul_removed
        self._repairs["time_replaced"] += tally.time_replaced

    def book_rows(self, rows: dict[str, int]) -> None:
        """A batch was committed with these rows by table."""
        self.batches += 1
        self._rows.update(rows)

    def book_dead_letter(self, stage: str) -> None:
        """One message became a dead letter at `stage`."""
        self._outcomes["dead_lettered"] += 1
        self._dead_letters[stage] += 1

    def book_latencies(self, received_us: Sequence[int], now_us: int) -> None:
        """Messages that arrived at these times are durable since `now_us`; a sample of them is kept."""
        step = max(1, len(received_us) // SAMPLES_PER_BATCH)
        self._latencies_us.extend(max(0, now_us - arrival) for arrival in received_us[::step])

    def balance(self, *, in_flight: int, queue_depth: int, queue_bytes: int, oldest_us: int | None) -> Balance:
        """The account at this moment, with what the pipeline counts where the messages are."""
        latencies = sorted(self._latencies_us)
        return Balance(
            received=self.received,
            outcomes={outcome: self._outcomes[outcome] for outcome in OUTCOMES},
            in_flight=in_flight,
            queue_depth=queue_depth,
            queue_bytes=queue_bytes,
            oldest_us=oldest_us,
            rows=dict(self._rows),
            ignored=dict(self._ignored),
            dead_letters=dict(self._dead_letters),
            repairs=dict(self._repairs),
            batches=self.batches,
            latency_p50_s=_percentile_s(latencies, 0.50),
            latency_p99_s=_percentile_s(latencies, 0.99),
        )


def _percentile_s(ordered_us: Sequence[int], share: float) -> float | None:
    if not ordered_us:
        return None
    return ordered_us[min(len(ordered_us) - 1, int(len(ordered_us) * share))] / 1e6
