"""What contestants have in common that are one program with one session at the broker: all but how it is configured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import closing
from typing import Any

import psycopg2

from benchmarks.contestant import Stage
from benchmarks.program import Program
from benchmarks.standing_session import StandingSession


class OneProgram(ABC):
    """See `Contestant`. The session is made before the program starts, and is ended after it."""

    name: str
    title: str
    guarantees: str
    rows_per_message = 1
    table: str
    """The statements that make its table."""
    stored = "telemetry"
    """A relation that has a row for every message: what stands after FROM."""
    at_most: int | None = None

    def __init__(self) -> None:
        self._program: Program | None = None
        self._session: StandingSession | None = None

    @property
    def client_id(self) -> str:
        """What it has to connect as, in MQTT 3.1.1, and without asking for a clean session."""
        return f"bench-{self.name}"

    @abstractmethod
    def install(self) -> str:
        """See `Contestant.install`."""

    @abstractmethod
    def launch(self, program: Program, stage: Stage) -> None:
        """Write its configuration, start it, return when it is connected."""

    def start(self, stage: Stage) -> None:
        """Make table and session, start the program."""
        with closing(psycopg2.connect(stage.dsn)) as connection, connection, connection.cursor() as cursor:
            cursor.execute(self.table)
        self._session = StandingSession(stage, self.client_id)
        self._session.make()
        self._program = Program(stage.directory / "program.log")
        self.launch(self._program, stage)

    def pids(self) -> list[int]:
        """The root of its processes."""
        return self._program.pids if self._program is not None else []

    def count(self, connection: Any) -> int:
        """Messages that are stored."""
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT count(*) FROM {self.stored}")  # noqa: S608 - of our own making
            return int(cursor.fetchone()[0])

    def most(self) -> int | None:
        """As many as take some ten seconds."""
        return self.at_most

    def stop(self) -> None:
        """End the program, then the session."""
        program, self._program = self._program, None
        session, self._session = self._session, None
        if program is not None:
            program.stop()
        if session is not None:
            session.end()
