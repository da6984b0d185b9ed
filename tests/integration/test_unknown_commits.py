"""A COMMIT of which nobody knows whether it happened, followed by everything else that can go wrong: stored once.

The database is real, behind a link that catches one COMMIT; the broker is scripted, so that it redelivers exactly what
a broker would, and proves no PUBACK. The bridge is the whole of it: in this process, or where it is killed a process of
its own.

A message's value is its packet id. Messages of two sessions that have the same id are therefore identical, and only
the session tells them apart; but for the window that is stated in docs/guarantees.md, where something else must.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import pytest

from mqtt_bridge import broker_connection, subscriber
from mqtt_bridge.bridge import Bridge
from mqtt_bridge.settings import load
from tests.acceptance.traffic import query
from tests.program import Program
from tests.scripted_broker import ScriptedBroker
from tests.waiting import wait_until
from tests.wire import CommitTrap

PROTOCOLS = ("5", "3.1.1")
STORED_BEFORE, IN_DOUBT = range(1, 6), range(6, 11)


class Fate(NamedTuple):
    """What becomes of the COMMIT."""

    holds: Literal["request", "answer"]
    ends: Literal["cut", "release"] = "cut"
    outlived: bool = False
    """The bridge loses the connection and the server does not: the twin is alive while the batch is tried again."""


FATES = {
    "COMMIT lost": Fate("request"),
    "answer lost": Fate("answer"),
    "COMMIT late, retry timed out": Fate("request", ends="release", outlived=True),
    "COMMIT late and then lost, retry timed out": Fate("request", outlived=True),
}

Event = Literal["broker cut", "session lost", "kill", "kill and session lost"]
STORIES: tuple[tuple[Event, ...], ...] = (
    (),
    ("broker cut",),
    ("session lost",),
    ("session lost", "broker cut"),
    ("kill",),
    ("broker cut", "kill"),
    ("session lost", "kill"),
    ("kill and session lost",),
)


class Running(Protocol):
    """A bridge."""

    def reasons(self) -> list[str]:
        """Why it is not ready."""

    def kill(self) -> None:
        """End it at once."""

    def start(self) -> object:
        """Start it again."""


class _Inside:
    """A bridge in this process: starts sooner."""

    def __init__(self, settings: dict[str, str]) -> None:
        self._bridge = Bridge(load(settings | {"HTTP_PORT": "0"}, env_file=None))
        self._thread = threading.Thread(target=self._bridge.run, name="bridge")

    def start(self) -> None:
        self._thread.start()

    def reasons(self) -> list[str]:
        return self._bridge.status()["reasons"]

    def kill(self) -> None:
        raise NotImplementedError("it would take the test with it")

    def stop(self) -> None:
        self._bridge.request_stop()
        self._thread.join(30)
        assert not self._thread.is_alive()


class _Outside(Program):
    """A bridge as a process."""

    def reasons(self) -> list[str]:
        return self.readyz()[1]


class Scene:
    """A bridge between a scripted broker, whose present session it keeps, and a database behind a trap."""

    def __init__(self, broker: ScriptedBroker, trap: CommitTrap, database: str, bridge: Running) -> None:
        self.broker, self.trap, self.database, self.bridge = broker, trap, database, bridge
        self.expected: Counter[int] = Counter()
        self._session: list[int] = []  # packet ids of what was published in the present session
        self._acked_before = 0  # PUBACKs that belong to earlier sessions
        self._offset = 0  # from packet id to value, in the present session

    # -- the broker

    def publish(self, ids: Iterable[int], *, dup: bool = False) -> None:
        """Send messages; those without DUP are new, and have to be stored."""
        for packet_id in ids:
            value = packet_id + self._offset
            self.broker.publish(b"devices/1/telemetry", b'{"seq": %d}' % value, mid=packet_id, dup=dup)
            if not dup:
                self._session.append(packet_id)
                self.expected[value] += 1

    @property
    def unacknowledged(self) -> list[int]:
        """What the session would redeliver, in order."""
        acked = set(self.broker.record.pubacks[self._acked_before :])
        return [packet_id for packet_id in self._session if packet_id not in acked]

    def settle(self) -> None:
        """Until everything of the present session is acknowledged."""
        wait_until(lambda: not self.unacknowledged, timeout_s=40, what="PUBACKs of the whole session")

    def cut(self) -> None:
        """The link to the broker is cut; what is unacknowledged comes again, and something new."""
        with self.connecting(session_present=True):
            self.broker.drop(reset=True)
        self.redeliver(self.unacknowledged)

    def redeliver(self, ids: Sequence[int]) -> None:
        """What a session brings to a new connection."""
        self.publish(ids, dup=True)
        self.publish([self._session[-1] + 1])

    def lose_session(self, *, offset: int = 0) -> None:
        """The broker forgets the session; on the next connection its ids begin again, with values higher by `offset`.

        Without one, its first messages are those that the first session began with.
        """
        self._offset = offset
        with self.losing_session():
            self.broker.drop(reset=True)

    @contextmanager
    def losing_session(self) -> Iterator[None]:
        """Inside, the bridge is made to connect; there is no session for it."""
        subscribes = len(self.broker.record.subscribes)
        with self.connecting(session_present=False):
            yield
        self.broker.wait_for_subscribe(subscribes + 1, timeout_s=30)
        self._session.clear()
        self._acked_before = len(self.broker.record.pubacks)
        self.publish(STORED_BEFORE)

    @contextmanager
    def connecting(self, *, session_present: bool) -> Iterator[None]:
        """Inside, the bridge is made to connect; afterwards it has."""
        self.broker.answer.session_present = session_present
        connects = len(self.broker.record.connects)
        yield
        self.broker.wait_for_connect(connects + 1, timeout_s=30)

    # -- the database

    def doubt(self, fate: Fate) -> None:
        """Five messages are stored, of five more the COMMIT is in doubt."""
        self.publish(STORED_BEFORE)
        self.settle()
        self.trap.arm()
        self.publish(IN_DOUBT)
        self.trap.wait()
        if fate.holds == "answer":
            wait_until(lambda: self.stored()[IN_DOUBT[0]], what="the COMMIT to happen")
        if fate.outlived:
            self.trap.orphan()
            wait_until(lambda: "time" in " ".join(self.bridge.reasons()), timeout_s=20, what="a time-out of the retry")

    def resolve(self, fate: Fate) -> None:
        """What was held back arrives at last, or never."""
        self.trap.release() if fate.ends == "release" else self.trap.cut()

    def stored(self) -> Counter[int]:
        """How often each value is stored."""
        rows = query(self.database, "SELECT value, count(*) FROM readings GROUP BY value")
        return Counter({int(value): count for value, count in rows})

    def waits_for_a_predecessor(self) -> bool:
        """Whether a claim waits for transactions of an earlier process."""
        return bool(query(self.database, "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))

    def assert_stored_once(self) -> None:
        """Everything that was published is stored as often as it was published."""
        enough = self.expected.total()
        wait_until(
            lambda: self.stored().total() >= enough, timeout_s=20, what=f"{enough} rows, there is {self.stored()}"
        )
        assert self.stored() == self.expected


MakeScene = Callable[..., Scene]


@pytest.fixture
def scene_of(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeScene]:
    """Makes a Scene whose bridge is subscribed, and ends it."""
    monkeypatch.setattr(broker_connection, "SESSION_WAIT_S", 0.2)
    monkeypatch.setattr(subscriber, "CONTESTED_CUTS", 100)
    with ExitStack() as stack:

        def make(holds: Literal["request", "answer"], protocol: str, *, inside: bool) -> Scene:
            broker = stack.enter_context(ScriptedBroker())
            broker.answer_subscribe = False
            port = int(query(database, "SHOW port")[0][0])
            trap = stack.enter_context(CommitTrap(port, holds=holds))
            settings = {
                "DATABASE_URL": database.replace(f":{port}/", f":{trap.port}/"),
                "DB_STATEMENT_TIMEOUT_S": "1",
                "MQTT_HOST": broker.host,
                "MQTT_PORT": str(broker.port),
                "MQTT_PROTOCOL": protocol,
                "BRIDGE_SHUTDOWN_S": "3",
            }
            bridge: Running
            if inside:
                bridge = _Inside(settings)
                stack.callback(bridge.stop)
                stack.callback(broker.drop)  # or it would wait for its acknowledgements to be proven
            else:
                bridge = stack.enter_context(_Outside(tmp_path, **settings))
            bridge.start()
            broker.wait_for_subscribe(timeout_s=30)
            return Scene(broker, trap, database, bridge)

        yield make


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("story", [story for story in STORIES if not any("kill" in event for event in story)], ids=str)
@pytest.mark.parametrize("fate", FATES.values(), ids=FATES)
def test_a_commit_in_doubt_is_resolved_and_every_message_stored_once(scene_of, fate, story, protocol):
    scene = scene_of(fate.holds, protocol, inside=True)
    scene.doubt(fate)

    for event in story:
        scene.cut() if event == "broker cut" else scene.lose_session()
    scene.resolve(fate)

    scene.settle()
    scene.assert_stored_once()
    assert_that_no_redelivery_is_stored(scene)


def assert_that_no_redelivery_is_stored(scene: Scene) -> None:
    """Not one PUBACK has arrived: the whole session comes again."""
    session = list(scene._session)
    with scene.connecting(session_present=True):
        scene.broker.drop(reset=True)
    scene.redeliver(session)
    scene.settle()
    scene.assert_stored_once()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("story", [story for story in STORIES if any("kill" in event for event in story)], ids=str)
@pytest.mark.parametrize("fate", FATES.values(), ids=FATES)
def test_a_commit_in_doubt_of_a_killed_bridge_is_resolved_by_the_next_one(scene_of, fate, story, protocol):
    scene = scene_of(fate.holds, protocol, inside=False)
    scene.doubt(fate)
    in_the_window = story[0] == "session lost" and fate.holds == "request"
    for event in story[:-1]:
        scene.cut() if event == "broker cut" else scene.lose_session(offset=100 if in_the_window else 0)

    scene.bridge.kill()
    session_is_lost_with_it = story[-1] == "kill and session lost"
    again = scene.losing_session() if session_is_lost_with_it else scene.connecting(session_present=True)
    with again:
        scene.bridge.start()
        if fate.holds == "request":  # its transaction is still open: the successor must not read the ledger yet
            wait_until(scene.waits_for_a_predecessor, timeout_s=20, what="the successor to wait")
            assert not scene.broker.connected
        scene.resolve(fate)
    if not session_is_lost_with_it:
        scene.redeliver(scene.unacknowledged)
    if "session lost" in " ".join(story) and fate.ends == "cut" and fate.holds == "request":
        # The broker has forgotten them, the bridge was killed, and the database rolled them back: nobody has them.
        scene.expected -= Counter(IN_DOUBT)

    scene.settle()
    scene.assert_stored_once()
    if not in_the_window:
        assert_that_no_redelivery_is_stored(scene)


@pytest.mark.xfail(
    strict=True, reason="the window that docs/guarantees.md states: the session is taken for the older one"
)
@pytest.mark.parametrize("offset", [0, 100], ids=["the same messages", "other messages"])
def test_a_session_that_a_killed_bridge_could_tell_nobody_of_is_told_from_the_one_before(scene_of, offset):
    scene = scene_of("request", "5", inside=False)
    scene.doubt(FATES["COMMIT lost"])
    scene.lose_session(offset=offset)  # while its transaction is open, the database cannot be told

    scene.bridge.kill()
    scene.expected -= Counter(IN_DOUBT)
    with scene.connecting(session_present=True):
        scene.bridge.start()
        wait_until(scene.waits_for_a_predecessor, timeout_s=20, what="the successor to wait")
        scene.trap.cut()
    scene.redeliver(scene.unacknowledged)
    scene.settle()
    assert scene.stored() == scene.expected
    assert_that_no_redelivery_is_stored(scene)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("holds", ["request", "answer"])
def test_where_every_commit_is_in_doubt_nothing_is_lost_and_nothing_stored_twice(scene_of, holds, protocol):
    """The link to the database is cut at every other COMMIT."""
    scene = scene_of(holds, protocol, inside=False)

    for packet_id in range(1, 11):
        scene.trap.arm()
        scene.publish([packet_id])
        scene.trap.wait()
        scene.trap.cut()
        scene.settle()

    assert scene.broker.record.pubacks == list(range(1, 11))
    scene.assert_stored_once()
