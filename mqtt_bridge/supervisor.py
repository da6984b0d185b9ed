"""Several processes of one bridge under one roof: `mqtt-bridge run` with BRIDGE_PROCESSES above 1.

Each process is a plain `mqtt-bridge run` with a client id, a ledger and a spool of its own; one shared subscription
deals the messages out among them. The supervisor only starts them, starts them again when they die, answers HTTP for
all of them, and stops them in order. It has nothing to do with any message.

Invariants: no process outlives the supervisor but for its own orderly end (`leash`). A process whose settings are
wrong, or whose client id was taken over, ends all of them, with its exit code.

Threads: `run` belongs to the main thread; each process has one (`member`), and so have client ids that are not needed
any more (`former_members`). HTTP asks `status` and the like in its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog

from mqtt_bridge import __version__, totals
from mqtt_bridge.commands import Commands
from mqtt_bridge.former_members import FormerMembers
from mqtt_bridge.member import Member, Sight, see_all
from mqtt_bridge.membership import client_ids, settings_of
from mqtt_bridge.metrics import ExpositionOfProcesses, ProcessSample
from mqtt_bridge.settings import Settings
from mqtt_bridge.watchdog import LEAVE_MARGIN_S
from mqtt_bridge.web import Web

log = structlog.get_logger(__name__)

ANSWER_S = 1.0
"""How long the processes have, together, to say how they are."""
KILL_MARGIN_S = LEAVE_MARGIN_S + 5.0
"""Beyond `BRIDGE_SHUTDOWN_S`: the process's own watchdog comes first."""


class Supervisor:
    """Runs the processes of one bridge."""

    def __init__(
        self, settings: Settings, inheritance: Mapping[str, str], *, abandoned_spool: str | None = None
    ) -> None:
        """`inheritance` is the environment that makes these settings; `abandoned_spool` as for the bridge."""
        self._settings = settings
        self._commands = Commands(settings, inheritance, abandoned_spool=abandoned_spool)
        self._members = [
            Member(client_id, self._commands.launcher(client_id), on_final=self._end_because)
            for client_id in client_ids(settings)
        ]
        self._former = FormerMembers(settings, self._commands.retire, ready=lambda: not self.unready_reasons())
        self._stopping = threading.Event()
        self._final_code: int | None = None
        self._began_s = time.monotonic()
        self._web = Web(
            host=settings.http_host,
            port=settings.http_port,
            token=settings.http_token.get_secret_value() if settings.http_token else None,
            status=self.status,
            healthy=self.unhealthy_reasons,
            ready=self.unready_reasons,
            metrics=ExpositionOfProcesses(self._samples).render,
        )

    # -- running

    def run(self) -> int:
        """Run until `request_stop`, or until a process ends for good; returns the exit code.

        Raises SettingsError when HTTP cannot be served as asked.
        """
        if self._settings.http_port:
            self._web.start()
        log.info(
            "several processes share the messages",
            processes=len(self._members),
            shared_group=settings_of(self._settings, self._members[0].client_id).mqtt_shared_group,
        )
        self._make_room_for_the_spools()
        for member in self._members:
            member.start()
        self._former.start()
        self._stopping.wait()
        return self._shut_down()

    def _make_room_for_the_spools(self) -> None:
        """Each process makes a directory of its own in it, and says so where it cannot."""
        if self._settings.bridge_spool_dir is not None:
            with suppress(OSError):
                self._settings.bridge_spool_dir.mkdir(mode=0o700)

    def request_stop(self) -> None:
        """Begin to shut down; any thread may call it."""
        self._stopping.set()

    def stop_now(self) -> None:
        """Kill every process, without order."""
        for member in self._members:
            member.kill()

    def _end_because(self, code: int) -> None:
        """A process has ended for a reason that the next one would end for as well."""
        if self._final_code is None:
            self._final_code = code
            log.error("a process of the bridge cannot go on, and no other in its place; stopping", exit_code=code)
        self._stopping.set()

    def _shut_down(self) -> int:
        log.info("stopping", processes=len(self._members))
        self._former.request_stop()
        for member in self._members:
            member.request_stop()
        self._former.stop()
        deadline_s = time.monotonic() + self._settings.bridge_shutdown_s + KILL_MARGIN_S
        for member in self._members:
            if not member.wait(max(0.0, deadline_s - time.monotonic())):
                log.warning(
                    "a process of the bridge does not come to its end: it is killed; what it had not acknowledged is"
                    " delivered again",
                    client_id=member.client_id,
                )
                member.kill()
                member.wait(KILL_MARGIN_S)
        self._web.stop()
        log.info("stopped")
        if self._final_code is not None:
            return self._final_code
        return 0 if all(member.exit_code == 0 for member in self._members) else 1

    # -- how it is

    def status(self) -> dict[str, Any]:
        """What `/api/status` answers: the sums, and each process apart."""
        sights = see_all(self._members, ANSWER_S)
        answered = [dict(sight.answer.observation.status) for sight in sights if sight.answer is not None]
        status = totals.total(answered, client_id=self._settings.mqtt_client_id)
        return {
            **status,
            "state": self._state(status["state"], complete=len(answered) == len(sights)),
            "reasons": self._unready(sights),
            "uptime_s": round(time.monotonic() - self._began_s, 1),
            "version": __version__,
            "processes": [_of_process(sight) for sight in sights],
        }

    def _state(self, of_those_that_answer: str, *, complete: bool) -> str:
        if self._stopping.is_set():
            return "draining"
        return of_those_that_answer if complete else totals.worst_state((of_those_that_answer, "starting"))

    def unready_reasons(self) -> list[str]:
        """Why not every process lets messages flow at the moment."""
        return self._unready(see_all(self._members, ANSWER_S))

    def _unready(self, sights: Sequence[Sight]) -> list[str]:
        of_them = [f"{sight.client_id}: {reason}" for sight in sights for reason in sight.unready]
        return [*(["shutting down"] if self._stopping.is_set() else []), *of_them]

    def unhealthy_reasons(self) -> list[str]:
        """Why somebody should step in; empty through an ordinary restart of a process."""
        if self._stopping.is_set():
            return []
        sights = see_all(self._members, ANSWER_S)
        return [f"{sight.client_id}: {reason}" for sight in sights for reason in sight.unhealthy]

    def _samples(self) -> list[ProcessSample]:
        return [
            ProcessSample(
                sight.client_id, sight.pid, sight.restarts, sight.answer.observation if sight.answer else None
            )
            for sight in see_all(self._members, ANSWER_S)
        ]


def _of_process(sight: Sight) -> dict[str, Any]:
    own = dict(sight.answer.observation.status) if sight.answer else {"state": None, "reasons": sight.unready}
    return {"client_id": sight.client_id, "pid": sight.pid, "restarts": sight.restarts, **own}
