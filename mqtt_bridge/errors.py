"""The errors of the bridge, and what each error of PostgreSQL means for it.

`BridgeError` is the root of a small tree: `SettingsError` ends the program with exit code 2, `MessageError` costs
one message (it becomes a dead letter), `SinkError` is about the database as a whole, `Fenced` ends the program with
exit code 3. `classify` is the one place that knows SQLSTATEs: it turns any exception that a batch can raise into a
`Failure` with a `Verdict`, the server's own sentence and, where one is known, the remedy.
"""

from __future__ import annotations

import enum
import re
import socket
import ssl
import struct
from dataclasses import dataclass
from typing import Literal

import psycopg2
from paho.mqtt.client import WebsocketConnectionError

Stage = Literal["route", "decode", "store"]
"""Where a message failed: no route took it, its bytes could not be decoded, or PostgreSQL refused its rows."""


class BridgeError(Exception):
    """Root of everything the bridge raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with the configuration."""

    setting: str
    """Name of the setting (`MQTT_PORT`), or the place in a file (`routes.toml: route "a": topic`)."""
    value: str
    """The value as given; secrets are shown as `***`; empty when nothing was given."""
    problem: str
    """What is wrong with it, one sentence."""
    remedy: str
    """What to do about it, one sentence in the imperative."""

    def __str__(self) -> str:
        shown = f"={self.value}" if self.value else ""
        return f"{self.setting}{shown}: {self.problem} {self.remedy}".strip()


class SettingsError(BridgeError):
    """The configuration is wrong. Carries every problem found, not just the first."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class MessageError(BridgeError):
    """One message cannot be stored: it becomes a dead letter with this stage and reason."""

    def __init__(self, reason: str, *, stage: Stage = "decode", route: str | None = None) -> None:
        self.reason = reason
        self.stage: Stage = stage
        self.route = route
        super().__init__(reason)


class SinkError(BridgeError):
    """The database as a whole cannot store now. The message says what is wrong and what to do."""


class SchemaError(SinkError):
    """Objects are missing from the database, or are not what the routes need. The message says which."""

    def __init__(self, message: str, *, sql: str = "") -> None:
        self.sql = sql
        """What makes the missing objects."""
        super().__init__(message)


class TableAltered(SinkError):
    """The columns of a table are no longer those that the rows were encoded for: to be read and encoded again."""

    def __init__(self) -> None:
        super().__init__("A table was altered while it was written to: its columns are read again.")


class Fenced(BridgeError):
    """Another process has taken over this client id: this one must stop at once (exit code 3)."""


class SpoolElsewhere(BridgeError):
    """Acknowledged messages of this client id may lie on a disk that is not at hand: not to be started without it."""

    def __init__(self, spool_id: str) -> None:
        self.spool_id = spool_id
        super().__init__(
            f"messages that were acknowledged may wait in the spool {spool_id}, which is not in BRIDGE_SPOOL_DIR."
            " Set BRIDGE_SPOOL_DIR to its directory (the bridge stores them first, also with BRIDGE_SPOOL=off), or give"
            f" them up for good: mqtt-bridge run --abandon-spool {spool_id}"
        )


class Verdict(enum.Enum):
    """What the bridge does about an error of the database."""

    RECONNECT = "reconnect"
    """The connection is gone or never came: drop it, retry with backoff from 0.1 to 30 s."""
    CONFLICT = "conflict"
    """Deadlock, serialization failure, a table altered on the way: retry at once, with jitter."""
    BUSY = "busy"
    """A lock or a time limit: retry with backoff, under the same batch key, for the first try may still be alive."""
    RESOURCES = "resources"
    """Disk, memory or connection slots are used up: long backoff. Never a dead letter."""
    BROKEN = "broken"
    """The server says that it is ill (I/O errors, internal errors): pause, and try now and then."""
    CONFIGURATION = "configuration"
    """A person must change something (a table, a grant, a setting): pause, and try now and then."""
    ROW = "row"
    """A row is at fault: find it, make it a dead letter, store all others."""
    UNKNOWN = "unknown"
    """Nothing that the table below knows: treated as ROW; a batch in which every row fails alike pauses instead."""


PAUSING = frozenset({Verdict.RESOURCES, Verdict.BROKEN, Verdict.CONFIGURATION})
"""Verdicts that wait for someone: readiness goes red, the state is `paused`."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of the database, understood."""

    verdict: Verdict
    sentence: str
    """The server's own sentence, on one line."""
    remedy: str = ""
    """What to do about it, naming the setting; empty where nothing better than waiting is known."""
    sqlstate: str | None = None
    sql: str = ""
    """What would mend it, where that is known."""

    def __str__(self) -> str:
        return f"{self.sentence} {self.remedy}".strip()


# SQLSTATEs, or their classes, to verdicts; the longest prefix decides (PostgreSQL manual, appendix A).
_BY_SQLSTATE = {
    "08P01": Verdict.CONFIGURATION,  # on an open connection: the columns are not what COPY was told
    "08": Verdict.RECONNECT,
    "57P": Verdict.RECONNECT,  # 57P01 to 57P05: the server ends this connection
    "25P03": Verdict.RECONNECT,  # idle in transaction for too long
    "25006": Verdict.RECONNECT,  # read-only: this was the primary until a moment ago
    "40001": Verdict.CONFLICT,
    "40P01": Verdict.CONFLICT,
    "55P03": Verdict.BUSY,
    "55006": Verdict.BUSY,
    "57014": Verdict.BUSY,
    "53": Verdict.RESOURCES,
    "58": Verdict.BROKEN,
    "XX": Verdict.BROKEN,
    "42": Verdict.CONFIGURATION,
    "3D000": Verdict.CONFIGURATION,
    "3F000": Verdict.CONFIGURATION,
    "28": Verdict.CONFIGURATION,
    "0A000": Verdict.CONFIGURATION,
    "22P03": Verdict.CONFIGURATION,  # likewise: COPY's bytes are always well formed, for the types that we know of
    "22": Verdict.ROW,
    "23502": Verdict.ROW,
    "23503": Verdict.ROW,
    "23505": Verdict.ROW,
    "23514": Verdict.ROW,
    "23P01": Verdict.ROW,
    "21000": Verdict.ROW,
    "44000": Verdict.ROW,
    "54": Verdict.ROW,
    "P0001": Verdict.ROW,
}

# Errors raised while rows are built, before the server saw them: NUL characters, lone surrogates, unfit numbers.
ROW_BUILDING = (ValueError, OverflowError, TypeError, struct.error)


def classify(error: BaseException, *, connected: bool) -> Failure:
    """What `error` means for the batch that raised it.

    `connected` tells whether the connection is still open: a closed one decides before any SQLSTATE, since libpq
    reports killed backends, restarts and all connect errors without a code.
    """
    if isinstance(error, TableAltered):
        return Failure(Verdict.CONFLICT, str(error))
    if isinstance(error, SchemaError):
        return Failure(Verdict.CONFIGURATION, str(error), sql=error.sql)
    if isinstance(error, SinkError | SettingsError):
        return Failure(Verdict.CONFIGURATION, str(error))
    if not isinstance(error, psycopg2.Error):
        verdict = Verdict.ROW if isinstance(error, ROW_BUILDING) else Verdict.UNKNOWN
        return Failure(verdict, f"{type(error).__name__}: {error}")
    sqlstate = error.pgcode
    lost = sqlstate is None and isinstance(error, psycopg2.InterfaceError | psycopg2.OperationalError)
    if lost or not connected:
        # A connection that the server's answer made useless (25006) has been closed by us: the code has the remedy.
        remedy = _connect_remedy(str(error)) or _SQLSTATE_REMEDIES.get(sqlstate or "", "")
        return Failure(Verdict.RECONNECT, _sentence(error), remedy, sqlstate)
    verdict = _verdict(sqlstate, error)
    remedy = "" if verdict is Verdict.ROW else _SQLSTATE_REMEDIES.get(sqlstate or "", "")
    return Failure(verdict, _sentence(error), remedy, sqlstate)


def _verdict(sqlstate: str | None, error: psycopg2.Error) -> Verdict:
    if sqlstate is None:
        return Verdict.ROW if isinstance(error, psycopg2.DataError) else Verdict.UNKNOWN
    if sqlstate == "23514" and not error.diag.constraint_name:
        return Verdict.CONFIGURATION  # "no partition of relation found for row": a table, not a row, is wrong
    for length in (5, 3, 2):
        if verdict := _BY_SQLSTATE.get(sqlstate[:length]):
            return verdict
    return Verdict.UNKNOWN


def _sentence(error: psycopg2.Error) -> str:
    """The error as one line: the server's primary message where there is one, with its detail."""
    if error.diag is not None and error.diag.message_primary:
        detail = f" ({error.diag.message_detail})" if error.diag.message_detail else ""
        return f"PostgreSQL says: {error.diag.message_primary}{detail}."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return f"PostgreSQL: {text}{'' if text.endswith('.') else '.'}"


# libpq's and the server's own texts when connecting fails; they carry no SQLSTATE.
_CONNECT_REMEDIES = (
    ("password authentication failed", "Correct the user and password in DATABASE_URL (or PGUSER, PGPASSWORD)."),
    ("no password supplied", "Put the password into DATABASE_URL, DATABASE_URL_FILE or PGPASSFILE."),
    (r"database .* does not exist", "Create the database, or correct its name in DATABASE_URL."),
    (r"role .* does not exist", "Create the role, or correct the user in DATABASE_URL."),
    ("is not permitted to log in", "Give the role LOGIN, or use another user in DATABASE_URL."),
    ("no pg_hba.conf entry", "Allow this host, user and database in the server's pg_hba.conf."),
    ("permission denied for database", "GRANT CONNECT ON DATABASE to the user in DATABASE_URL."),
    ("not currently accepting connections", "Open the database again: ALTER DATABASE with ALLOW_CONNECTIONS true."),
    (r"too many connections for", "Raise the CONNECTION LIMIT of the role or database, or lower DB_POOL_SIZE."),
    (r"too many (clients|connections)|connection slots", "Raise max_connections on the server, or lower DB_POOL_SIZE."),
    (r"could not translate host name|name or service not known", "Correct the host in DATABASE_URL (or PGHOST)."),
    ("no more connections allowed", "Raise max_client_conn in pgbouncer.ini, or lower DB_POOL_SIZE."),
    (
        "unsupported startup parameter",
        "PgBouncer refuses what it does not know: leave `options` out of DATABASE_URL (and PGOPTIONS) and give the role"
        " its settings with ALTER ROLE ... SET, or name it in ignore_startup_parameters of pgbouncer.ini.",
    ),
    ("server does not support SSL", "Enable SSL on the server, or lower sslmode in DATABASE_URL (or PGSSLMODE)."),
    (r"certificate|SSL error", "Correct sslmode, sslrootcert, sslcert or sslkey in DATABASE_URL."),
    (r"invalid (connection option|integer value|URI|port)|invalid dsn", "Correct DATABASE_URL."),
    (r"starting up|shutting down|in recovery|not yet accepting", "The server will be there in a moment."),
    (r"refused|No such file", "Start PostgreSQL, or correct host and port in DATABASE_URL (or PGHOST, PGPORT)."),
    (r"timeout expired|timed out|No route|unreachable", "Check host, port and firewall for DATABASE_URL."),
)


def _connect_remedy(text: str) -> str:
    for pattern, remedy in _CONNECT_REMEDIES:
        if re.search(pattern, text, re.IGNORECASE):
            return remedy
    return ""


_OTHER_TYPES = "The table's columns are not of the types that the bridge writes: `mqtt-bridge check` names them."
_SQLSTATE_REMEDIES = {
    "42501": (
        "Grant what is missing to the user in DATABASE_URL: `mqtt-bridge schema` prints objects and grants"
        " (PostgreSQL 15 and newer refuse CREATE in the schema public to ordinary roles)."
    ),
    "42P01": "Create the table: `mqtt-bridge schema --apply`, or set DB_AUTO_CREATE=true.",
    "42703": "Add the column, or let the bridge write to another table: `mqtt-bridge schema` prints what it expects.",
    "3F000": "Create the schema: `mqtt-bridge schema --apply`, or set DB_AUTO_CREATE=true.",
    "3D000": "Create the database, or correct its name in DATABASE_URL.",
    "28P01": "Correct the user and password in DATABASE_URL.",
    "08P01": _OTHER_TYPES,
    "22P03": _OTHER_TYPES,
    "23514": "Create a partition for these times, or a default partition: `mqtt-bridge schema` prints how.",
    "57014": "It took longer than DB_STATEMENT_TIMEOUT_S: raise that, or look for what slows the server down.",
    "53100": "Free disk space on the database server.",
    "53200": "Give the database server more memory.",
    "53300": "Raise max_connections on the server, or lower DB_POOL_SIZE.",
    "25006": "The server is read-only; with several hosts in DATABASE_URL the bridge finds the primary.",
}


# MQTT 5 CONNACK reasons (section 3.2.2.2) and their 3.1.1 kin, by the names that paho gives them.
_REFUSALS = {
    "bad user name or password": "Correct MQTT_USERNAME and MQTT_PASSWORD.",
    "not authorized": "Correct MQTT_USERNAME and MQTT_PASSWORD, or the broker's ACL for MQTT_CLIENT_ID.",
    "banned": "The broker has banned this client: ask its operator, or change MQTT_USERNAME or MQTT_CLIENT_ID.",
    "client identifier not valid": "Choose another MQTT_CLIENT_ID.",
    "unsupported protocol version": "Set MQTT_PROTOCOL=3.1.1 (or 5): this broker does not speak the other.",
    "quota exceeded": "Raise the broker's limit on connections or sessions.",
    "use another server": "Set MQTT_HOST to the server that the broker names.",
}


def explain_refusal(reason: str) -> str:
    """One line for a CONNECT that the broker refused: its reason and the setting to change."""
    remedy = _REFUSALS.get(reason.lower(), "Ask the broker's log for the cause.")
    return f"the broker refused the connection: {reason}. {remedy}"


def explain_unreachable(error: BaseException, *, host: str, port: int) -> str:
    """One line for a broker that could not be reached: what failed and the setting to change."""
    where = f"{host}:{port}"
    if isinstance(error, socket.gaierror | UnicodeError):
        return f"the broker's host name {host!r} is not known. Correct MQTT_HOST."
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of the broker at {where} was refused: {error.verify_message}. "
            "Set MQTT_TLS_CA to the authority that signed it, and MQTT_HOST to a name that it carries."
        )
    if isinstance(error, ssl.SSLError):
        return (
            f"TLS with the broker at {where} failed: {error.reason or error}. "
            "Check that MQTT_PORT is its TLS port, and MQTT_TLS_CERT and MQTT_TLS_KEY if it asks for a certificate."
        )
    if isinstance(error, WebsocketConnectionError):
        return (
            f"the server at {where} speaks no MQTT over websockets there: {error}. Correct MQTT_WS_PATH and MQTT_PORT."
        )
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens at {where}. Start the broker, or correct MQTT_HOST and MQTT_PORT."
    if isinstance(error, TimeoutError):
        return f"the broker at {where} did not answer in time. Check MQTT_HOST, MQTT_PORT and the firewall."
    why = str(error) or type(error).__name__
    return f"the broker at {where} cannot be reached: {why}. Check MQTT_HOST, MQTT_PORT and MQTT_TLS."


def explain_hangup(*, host: str, port: int, tls: bool) -> str:
    """One line for a peer that took the connection and ended it without an answer to CONNECT."""
    likely = "MQTT_TLS_CERT and MQTT_TLS_KEY (it may ask for a certificate)" if tls else "MQTT_TLS"
    return (
        f"what listens at {host}:{port} ended the connection without an answer."
        f" Check MQTT_PORT, {likely}, MQTT_TRANSPORT and MQTT_PROTOCOL."
    )
