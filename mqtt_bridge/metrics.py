"""Every metric that `/metrics` shows: its name, its meaning, and where its figure comes from.

All figures are read at the moment of the scrape, most of them from one `Observation`, so that the account of messages
balances here as it does in `/api/status`. Names follow the Prometheus conventions (base units, `_total` for counters).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from mqtt_bridge.account import Balance


@dataclass(frozen=True, slots=True)
class Observation:
    """The state of the bridge at one moment."""

    status: Mapping[str, Any]
    """What `/api/status` answers."""
    balance: Balance
    retries: int
    """Tries to store a batch that failed and were, or will be, repeated."""
    unproven_acks: int
    """PUBACKs sent that the broker is not yet known to have seen."""
    ready: bool
    healthy: bool


Figure = float | None | Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Declared:
    """A metric: what it is called, what it says, and how it is read."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    read: Callable[[Observation], Figure]
    """A number; numbers by label value where there is a label; None where there is nothing to say."""
    label: str | None = None


STATES = ("starting", "running", "paused", "draining")

METRICS: tuple[Declared, ...] = (
    Declared(
        "mqtt_bridge_messages_received_total",
        "counter",
        "Messages received from the broker. Equals the sum of mqtt_bridge_messages_total and those in flight.",
        lambda o: o.balance.received,
    ),
    Declared(
        "mqtt_bridge_messages_total",
        "counter",
        "Messages that have reached their end, by outcome.",
        lambda o: o.balance.outcomes,
        "outcome",
    ),
    Declared(
        "mqtt_bridge_messages_in_flight",
        "gauge",
        "Messages received and not yet at their end.",
        lambda o: o.balance.in_flight,
    ),
    Declared(
        "mqtt_bridge_ignored_total",
        "counter",
        "Messages ignored on purpose, by reason.",
        lambda o: o.balance.ignored,
        "reason",
    ),
    Declared(
        "mqtt_bridge_dead_letters_total",
        "counter",
        "Messages kept as dead letters, by the stage they failed at.",
        lambda o: o.balance.dead_letters,
        "stage",
    ),
    Declared(
        "mqtt_bridge_repairs_total",
        "counter",
        "Values repaired or left out: nan_skipped, nul_removed, time_replaced.",
        lambda o: o.balance.repairs,
        "repair",
    ),
    Declared(
        "mqtt_bridge_rows_stored_total",
        "counter",
        "Rows committed, by table: new ones, or changed by a route with a key.",
        lambda o: o.balance.rows,
        "table",
    ),
    Declared("mqtt_bridge_batches_total", "counter", "Batches settled.", lambda o: o.balance.batches),
    Declared(
        "mqtt_bridge_batch_retries_total",
        "counter",
        "Tries to store a batch that failed and were repeated.",
        lambda o: o.retries,
    ),
    Declared(
        "mqtt_bridge_latency_seconds",
        "gauge",
        "Time from arrival to commit of the newest messages, by quantile.",
        lambda o: {"0.5": o.balance.latency_p50_s, "0.99": o.balance.latency_p99_s},
        "quantile",
    ),
    Declared(
        "mqtt_bridge_oldest_unacked_seconds",
        "gauge",
        "Age of the oldest message in flight; 0 without any.",
        lambda o: o.status["oldest_unacked_s"],
    ),
    Declared(
        "mqtt_bridge_unproven_acks",
        "gauge",
        "PUBACKs sent that the broker is not yet known to have seen.",
        lambda o: o.unproven_acks,
    ),
    Declared("mqtt_bridge_queue_messages", "gauge", "Messages waiting for a worker.", lambda o: o.balance.queue_depth),
    Declared(
        "mqtt_bridge_queue_bytes", "gauge", "Memory taken by the messages in flight.", lambda o: o.balance.queue_bytes
    ),
    Declared(
        "mqtt_bridge_queue_size",
        "gauge",
        "Bound on the messages held (BRIDGE_QUEUE_SIZE).",
        lambda o: o.status["queue"]["size"],
    ),
    Declared(
        "mqtt_bridge_broker_connected",
        "gauge",
        "Whether there is a connection to the broker.",
        lambda o: o.status["broker"]["connected"],
    ),
    Declared(
        "mqtt_bridge_broker_reconnects_total",
        "counter",
        "Connections to the broker after the first.",
        lambda o: o.status["broker"]["reconnects"],
    ),
    Declared(
        "mqtt_bridge_broker_dropped_total",
        "counter",
        "Messages that the broker says it has dropped since its start, of any client; absent where it does not say.",
        lambda o: o.status["broker"]["dropped"],
    ),
    Declared(
        "mqtt_bridge_database_connected",
        "gauge",
        "Whether the database answered when it was last asked.",
        lambda o: o.status["database"]["connected"],
    ),
    Declared(
        "mqtt_bridge_database_pool_in_use",
        "gauge",
        "Database connections in use.",
        lambda o: o.status["database"]["pool_in_use"],
    ),
    Declared(
        "mqtt_bridge_database_pool_size",
        "gauge",
        "Database connections at most (DB_POOL_SIZE).",
        lambda o: o.status["database"]["pool_size"],
    ),
    Declared(
        "mqtt_bridge_spool_messages", "gauge", "Messages in the disk buffer.", lambda o: o.status["spool"]["messages"]
    ),
    Declared("mqtt_bridge_spool_bytes", "gauge", "Bytes in the disk buffer.", lambda o: o.status["spool"]["bytes"]),
    Declared(
        "mqtt_bridge_spool_full",
        "gauge",
        "Whether the disk buffer takes nothing more.",
        lambda o: o.status["spool"]["full"],
    ),
    Declared(
        "mqtt_bridge_spool_damaged_messages",
        "gauge",
        "Messages that the disk returned damaged; their bytes are kept in the spool's file.",
        lambda o: o.status["spool"]["damaged"],
    ),
    Declared("mqtt_bridge_ready", "gauge", "Whether /readyz answers 200.", lambda o: o.ready),
    Declared("mqtt_bridge_healthy", "gauge", "Whether /healthz answers 200.", lambda o: o.healthy),
    Declared(
        "mqtt_bridge_state",
        "gauge",
        "The state of the bridge: 1 for the present one, 0 for the others.",
        lambda o: {state: state == o.status["state"] for state in STATES},
        "state",
    ),
    Declared("mqtt_bridge_uptime_seconds", "gauge", "Time since the process started.", lambda o: o.status["uptime_s"]),
    Declared(
        "mqtt_bridge_info",
        "gauge",
        "Always 1; the label tells the version.",
        lambda o: {o.status["version"]: 1},
        "version",
    ),
)


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One of several processes of a bridge at one moment."""

    client_id: str
    pid: int | None
    """None where it does not run."""
    restarts: int
    observation: Observation | None
    """None where it did not answer in time."""


@dataclass(frozen=True, slots=True)
class DeclaredOfProcess:
    """A metric that only several processes have."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    read: Callable[[ProcessSample], float]
    label: str = "process"


PROCESS_METRICS: tuple[DeclaredOfProcess, ...] = (
    DeclaredOfProcess(
        "mqtt_bridge_process_up",
        "gauge",
        "Whether this process runs and answers its supervisor. Only with BRIDGE_PROCESSES above 1.",
        lambda sample: sample.observation is not None,
    ),
    DeclaredOfProcess(
        "mqtt_bridge_process_restarts_total",
        "counter",
        "Starts of this process after the first. Only with BRIDGE_PROCESSES above 1.",
        lambda sample: sample.restarts,
    ),
)

SUPERVISOR = "supervisor"
"""The process label of the supervisor's own figures. Client ids of several processes end in a number."""


class Exposition:
    """Renders the metrics for Prometheus, with those of the process beside them."""

    def __init__(self, observe: Callable[[], Observation]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(observe))
        ProcessCollector(registry=self._registry)

    def render(self) -> tuple[bytes, str]:
        """The body of `/metrics`, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


_Family = CounterMetricFamily | GaugeMetricFamily


class _Collector(Collector):
    def __init__(self, observe: Callable[[], Observation]) -> None:
        self._observe = observe

    def describe(self) -> list[Metric]:
        """Nothing: the registry shall not observe a bridge that is still being built."""
        return []

    def collect(self) -> Iterator[Metric]:
        observation = self._observe()
        for declared in METRICS:
            yield _family(declared, declared.read(observation))


def _family(declared: Declared, figure: Figure) -> Metric:
    family = _make_family(declared, [declared.label] if declared.label else [])
    _add(family, figure)
    return family


def _make_family(declared: Declared | DeclaredOfProcess, labels: list[str]) -> _Family:
    make = CounterMetricFamily if declared.kind == "counter" else GaugeMetricFamily
    return make(declared.name, declared.help, labels=labels)


def _add(family: _Family, figure: Figure, *labels: str) -> None:
    for value, number in figure.items() if isinstance(figure, Mapping) else [(None, figure)]:
        if number is not None:
            family.add_metric([*labels] if value is None else [*labels, value], float(number))


class ExpositionOfProcesses:
    """Renders the metrics of several processes: the same names, each sample with its `process`, the client id."""

    def __init__(self, look: Callable[[], Sequence[ProcessSample]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ProcessesCollector(look))

    def render(self) -> tuple[bytes, str]:
        """The body of `/metrics`, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _ProcessesCollector(Collector):
    def __init__(self, look: Callable[[], Sequence[ProcessSample]]) -> None:
        self._look = look

    def describe(self) -> list[Metric]:
        """Nothing: the registry shall not look at processes that are still to be started."""
        return []

    def collect(self) -> Iterator[Metric]:
        samples = self._look()
        for declared in METRICS:
            family = _make_family(declared, ["process", *([declared.label] if declared.label else [])])
            for sample in samples:
                if sample.observation is not None:
                    _add(family, declared.read(sample.observation), sample.client_id)
            yield family
        for of_process in PROCESS_METRICS:
            family = _make_family(of_process, [of_process.label])
            for sample in samples:
                _add(family, of_process.read(sample), sample.client_id)
            yield family
        yield from _of_the_system(samples)


def _of_the_system(samples: Sequence[ProcessSample]) -> Iterator[Metric]:
    """What the system says of each process, and of the supervisor."""
    families: dict[str, Metric] = {}
    processes: list[tuple[str, int | str]] = [(SUPERVISOR, "self")]
    processes += [(sample.client_id, sample.pid) for sample in samples if sample.pid is not None]
    for label, pid in processes:
        for metric in ProcessCollector(registry=None, pid=lambda pid=pid: pid).collect():  # type: ignore[misc]
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            for sample in metric.samples:
                family.add_sample(sample.name, {**sample.labels, "process": label}, sample.value)
    yield from families.values()
