"""Has the client ids retired that this bridge had a process for, and has none any more: after BRIDGE_PROCESSES was
lowered, or changed from one to several or back.

Their sessions go on collecting messages, in a shared group their full share, for nobody. Which they are is noted in the
database when a client id is claimed. Retiring is done by `mqtt-bridge retire` in a process of its own for each, after
the present processes have subscribed, so that nothing is published to nobody meanwhile.

Whatever dies on the way, the note stays until a client id is retired, and the next start goes on.

Threads: `mqtt-bridge-former-members`, and one beside it for each client id that is being retired.
"""

from __future__ import annotations

import random
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import psycopg2
import structlog

from mqtt_bridge import ownership
from mqtt_bridge.connections import BridgeConnection
from mqtt_bridge.errors import BridgeError
from mqtt_bridge.leash import STOP
from mqtt_bridge.membership import client_ids
from mqtt_bridge.settings import Settings

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 0.5
"""How often it is asked whether the present processes have subscribed."""
FIRST_DELAY_S, LONGEST_DELAY_S = 2.0, 300.0
"""Between two tries; jittered."""
AT_ONCE = 8
"""Retired side by side at most: each takes a pool of connections to the database."""
LEAVE_S = 10.0
"""A retirement that is told to stop has this long; it can be killed at any moment."""

LaunchRetirement = Callable[[str, int], "subprocess.Popen[str]"]


class FormerMembers:
    """Finds them and has them retired, from `start` until there are none, or `stop`."""

    def __init__(self, settings: Settings, launch: LaunchRetirement, *, ready: Callable[[], bool]) -> None:
        """`launch` starts the command for a client id, tied to a descriptor; `ready`: all present ones subscribed."""
        self._settings = settings
        self._launch = launch
        self._ready = ready
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mqtt-bridge-former-members", daemon=True)

    def start(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    def request_stop(self) -> None:
        """Have what is being done interrupted; it is gone on with at the next start."""
        self._stopping.set()

    def stop(self, timeout_s: float = LEAVE_S) -> None:
        """The same, and wait for it. Idempotent, safe when never started."""
        self.request_stop()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    # -- the thread

    def _run(self) -> None:
        while not self._ready():
            if self._stopping.wait(LOOK_EVERY_S):
                return
        delay_s = FIRST_DELAY_S
        while not self._stopping.is_set():
            try:
                if self._try():
                    return
            except Exception:  # the next try may well succeed, and nobody else would make one
                log.exception("client ids that are not needed any more could not be looked for; it is tried again")
            self._stopping.wait(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(LONGEST_DELAY_S, delay_s * 2)

    def _try(self) -> bool:
        """Whether there are none any more."""
        try:
            former = self._look_up()
        except (psycopg2.Error, BridgeError) as error:
            log.debug("former client ids could not be looked up, to be tried again", error=str(error))
            return False
        if not former:
            return True
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="mqtt-bridge-retiring") as pool:
            return all(list(pool.map(self._retire, former)))

    def _look_up(self) -> Sequence[str]:
        present = client_ids(self._settings)
        with closing(psycopg2.connect(self._settings.dsn(), connection_factory=BridgeConnection)) as connection:
            return ownership.former_members(connection, self._settings.mqtt_client_id, present)

    def _retire(self, client_id: str) -> bool:
        """Whether it is retired."""
        log.info(
            "a client id is not needed any more: what its session holds is stored, then it is ended",
            retiring=client_id,
        )
        try:
            code, said = self._run_command(client_id)
        except OSError as error:
            code, said = 1, str(error)
        if code == 0:
            log.info("a client id is retired", retired=client_id, said=said)
        elif not self._stopping.is_set():
            log.warning(
                "a client id that is not needed any more could not be retired: what its session holds waits,"
                " and it is tried again",
                retiring=client_id,
                exit_code=code,
                said=said,
            )
        return code == 0

    def _run_command(self, client_id: str) -> tuple[int, str]:
        """Exit code, and the last line that it has printed."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = self._launch(client_id, theirs.fileno())
            with process:
                watch = threading.Thread(target=self._end, args=(process, ours), name="mqtt-bridge-retiring-watch")
                watch.start()
                output, _ = process.communicate()
                watch.join()
        return process.returncode, output.strip().rpartition("\n")[2]

    def _end(self, process: subprocess.Popen[str], leash: socket.socket) -> None:
        """When it is time to stop, tell the command so, and end it if it does not obey."""
        while process.poll() is None:
            if self._stopping.wait(LOOK_EVERY_S):
                with suppress(OSError):  # it has just ended by itself
                    leash.send(STOP)
                try:
                    process.wait(LEAVE_S / 2)
                except subprocess.TimeoutExpired:
                    process.kill()
                return
