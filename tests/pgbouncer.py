"""A PgBouncer for tests: `with PgBouncer(postgres) as pooler: psycopg2.connect(pooler.dsn("test_1"))`.

Installed or, on Debian and Ubuntu, unpacked as Mosquitto is. It refuses to run as root, as PostgreSQL does, and so runs
as the same account.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import psycopg2

from mqtt_bridge.tools.embedded import EmbeddedServerError, Postgres, debian
from mqtt_bridge.tools.embedded.account import cache_directory
from mqtt_bridge.tools.embedded.server import HOST, EmbeddedServer

_REMEDY = "PgBouncer is not there: apt-get install pgbouncer; dnf install pgbouncer; brew install pgbouncer."

Mode = Literal["session", "transaction", "statement"]


class PgBouncer(EmbeddedServer):
    """One PgBouncer in front of a PostgreSQL. `settings` are lines of its configuration."""

    name = "pgbouncer"
    stop_signal = signal.SIGTERM

    def __init__(self, postgres: Postgres, mode: Mode, *, settings: Sequence[str] = ()) -> None:
        super().__init__(None, port=None)
        self._postgres = postgres
        self._mode = mode
        self._settings = tuple(settings)
        self._program: tuple[str, ...] = ()

    @property
    def pid(self) -> int | None:
        """Its process id; None when it does not run."""
        return self._guarded.pid

    def restart(self) -> None:
        """End it at once, with all connections, and start it on the same port."""
        self.stop()
        self.start()

    def dsn(self, database: str, user: str = "postgres") -> str:
        """The URL of a database behind it."""
        return f"postgresql://{user}@{HOST}:{self.port}/{database}"

    def show(self, what: str) -> list[dict[str, object]]:
        """What its console says: `show("pools")`."""
        with closing(psycopg2.connect(self.dsn("pgbouncer"), connect_timeout=10)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(f"SHOW {what}")
                names = [column.name for column in cursor.description or ()]
                return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _prepare(self) -> None:
        self._program = self._program or _find_program()
        users = self.directory / "users"
        users.write_text('"postgres" ""\n')
        users.chmod(0o644)

    def _command(self, port: int) -> Sequence[str | Path]:
        config = self.directory / "pgbouncer.ini"
        config.write_text(
            "\n".join(
                [
                    "[databases]",
                    f"* = host={HOST} port={self._postgres.port}",
                    "[pgbouncer]",
                    f"listen_addr = {HOST}",
                    f"listen_port = {port}",
                    "unix_socket_dir =",
                    "auth_type = trust",
                    f"auth_file = {self.directory / 'users'}",
                    "admin_users = postgres",
                    f"pool_mode = {self._mode}",
                    # A server that was away is asked again soon: the default would make tests wait for 15 s.
                    "server_login_retry = 1",
                    *self._settings,
                    "",
                ]
            )
        )
        config.chmod(0o644)
        return [*self._program, config]

    def _answers(self, port: int) -> bool:
        try:
            config = {str(row["key"]): row["value"] for row in self._config(port)}
        except psycopg2.OperationalError:
            return False
        if config["auth_file"] != str(self.directory / "users"):
            raise EmbeddedServerError(f"Port {port} is answered by another PgBouncer.")
        return True

    def _config(self, port: int) -> list[dict[str, object]]:
        self._port, kept = port, self._port
        try:
            return self.show("config")
        finally:
            self._port = kept


def _find_program() -> tuple[str, ...]:
    if installed := shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/opt/homebrew/bin"):
        return (installed,)
    target = cache_directory() / "pgbouncer"
    if not target.exists():
        try:
            debian.unpack(["pgbouncer"], target)
        except EmbeddedServerError as error:
            raise EmbeddedServerError(f"{_REMEDY} {error}") from error
    libraries = ":".join(map(str, debian.library_path(target)))
    return ("env", f"LD_LIBRARY_PATH={libraries}", str(target / "usr/sbin/pgbouncer"))
