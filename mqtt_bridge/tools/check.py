"""What `mqtt-bridge check` looks at: settings, database and broker, and what would bite in production.

Each finding is one line that names the setting to change. A *problem* keeps the bridge from working (exit code 2), a
*warning* is a risk that its owner should know of.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator, Sequence

import psycopg2
from psycopg2 import sql

from mqtt_bridge import schema
from mqtt_bridge.broker_connection import BrokerConnection
from mqtt_bridge.broker_limits import DropWatch, shortfalls
from mqtt_bridge.connections import BridgeConnection
from mqtt_bridge.errors import BridgeError, Problem, SettingsError, classify, explain_unreachable
from mqtt_bridge.settings import Settings
from mqtt_bridge.tools.check_processes import check_connections, check_processes, members
from mqtt_bridge.tools.check_spool import check_disk, check_spool
from mqtt_bridge.tools.findings import Finding
from mqtt_bridge.tools.guest import hindrance, named_by_user, step_until, visit
from mqtt_bridge.tools.status import NoStatus, fetch

DROPS_TIMEOUT_S = 2.0


def check(
    settings: Settings, filters: Sequence[str], *, unknown: Sequence[Problem] = (), offline: bool = False
) -> Iterator[Finding]:
    """Everything there is to say, a finding at a time; servers are asked unless `offline`."""
    yield Finding("ok", f"settings are valid; subscribing to {', '.join(filters)}")
    yield from (Finding("warning", str(problem)) for problem in unknown)
    if settings.mqtt_qos == 0:
        yield Finding("warning", "MQTT_QOS=0: messages may be lost on the way. Set MQTT_QOS=1.")
    if not settings.mqtt_tls and settings.mqtt_password and settings.mqtt_host not in _LOOPBACK:
        yield Finding("warning", "MQTT_PASSWORD travels unencrypted. Set MQTT_TLS=true and the broker's TLS port.")
    yield from check_processes(settings)
    if not offline:
        yield from check_database(settings)
        yield from _check_spools(settings)
        yield from check_broker(settings, filters)
        yield from check_http(settings)


_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def _check_spools(settings: Settings) -> Iterator[Finding]:
    directory = settings.bridge_spool_dir
    if directory is None or not directory.exists():  # the bridge makes it, and in it one for each of several processes
        yield from check_spool(settings, processes=settings.bridge_processes)
    else:
        for each in members(settings):
            yield from check_spool(each, processes=settings.bridge_processes)


# -- the database


def check_database(settings: Settings) -> Iterator[Finding]:
    """Whether the database can be reached, has what is needed, and keeps what it says it has committed."""
    try:
        connection = psycopg2.connect(settings.dsn(), connection_factory=BridgeConnection)
    except (psycopg2.Error, SettingsError) as error:
        yield Finding("problem", f"database: {classify(error, connected=False)}")
        return
    try:
        yield from _inspect_database(connection, settings)
    except psycopg2.Error as error:
        yield Finding("problem", f"database: {classify(error, connected=not connection.closed)}")
    finally:
        connection.close()


def _inspect_database(connection: BridgeConnection, settings: Settings) -> Iterator[Finding]:
    info = connection.info
    yield Finding("ok", f"database {info.dbname!r} at {info.host or 'local socket'}:{info.port} answers as {info.user}")
    if schema.server_version(connection) < schema.OLDEST_SERVER:
        yield Finding("problem", f"PostgreSQL {schema.server_version(connection)} is too old. Use 14 or newer.")
    absent = schema.missing(connection)
    if not absent:
        faults = schema.unfit(connection) + schema.forbidden(connection)
        yield from (Finding("problem", f"database: {fault}.") for fault in faults)
        if not faults:
            yield Finding("ok", "tables and grants are as they should be")
            for each in members(settings):
                yield from check_disk(connection, each)
    elif settings.db_auto_create:
        yield from _check_creation(connection, absent)
    else:
        remedy = "Run `mqtt-bridge schema --apply`, or set DB_AUTO_CREATE=true."
        yield from (Finding("problem", f"database: {item}. {remedy}") for item in absent)
    yield from check_connections(connection, settings)
    yield from _check_durability(connection)


def _check_creation(connection: BridgeConnection, absent: Sequence[str]) -> Iterator[Finding]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT has_database_privilege(current_database(), 'CREATE'),"
            " has_schema_privilege(current_schema(), 'CREATE'), current_schema(), current_user"
        )
        database, in_schema, name, role = cursor.fetchone() or (False, False, None, "")
    if database and in_schema:
        yield Finding("ok", f"the bridge will create at its start what is missing: {len(absent)} tables")
        return
    quoted = {
        key: sql.Identifier(value).as_string(connection)
        for key, value in {"role": role, "database": connection.info.dbname, "schema": name or "public"}.items()
    }
    grants = [] if database else ["GRANT CREATE ON DATABASE {database} TO {role}".format(**quoted)]
    grants += [] if in_schema else ["GRANT CREATE ON SCHEMA {schema} TO {role}".format(**quoted)]
    yield Finding(
        "problem",
        f"database: tables are missing and {role} may not create them (PostgreSQL 15 and newer refuse CREATE in public"
        f" to ordinary roles). Run {' and '.join(grants)}, or have an owner apply what `mqtt-bridge schema` prints.",
    )


def _check_durability(connection: BridgeConnection) -> Iterator[Finding]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('fsync'), current_setting('full_page_writes'), pg_is_in_recovery()")
        fsync, full_page_writes, standby = cursor.fetchone() or ("on", "on", False)
    if fsync != "on":
        yield Finding("warning", "the server runs with fsync=off: a crash of its machine loses committed readings.")
    if full_page_writes != "on":
        yield Finding("warning", "the server runs with full_page_writes=off: a crash can corrupt the database.")
    if standby:
        yield Finding("problem", "the server is a read-only standby. Point DATABASE_URL at the primary.")


# -- the broker


def check_broker(settings: Settings, filters: Sequence[str]) -> Iterator[Finding]:
    """Whether the broker lets the bridge in, lets it subscribe, grants what it asks for, and keeps what it is given.

    Under a client id of its own: the id of a running bridge would cut it off. The first connection asks for a lasting
    session, to see what is granted, and subscribes to nothing; the second takes it away again. Unless a session was
    there: a client id that nobody has can have none, so it is that of the user, who may well be the bridge.
    """
    guest = members(settings)[0].model_copy(
        update={
            "mqtt_client_id": f"{settings.mqtt_client_id}-check-{uuid.uuid4().hex[:6]}",
            "mqtt_retained": "never",
        }
    )
    address = f"{settings.mqtt_host}:{settings.mqtt_port}"
    try:
        if settings.bridge_processes > 1 and named_by_user(guest):
            yield Finding("problem", _NAMED_BY_USER)
            return
        with visit(guest, filters=(), lasting=True) as connection:
            if (problem := hindrance(connection, settings)) is not None:
                yield Finding("problem", f"MQTT: {problem}")
                return
            for shortfall in shortfalls(guest, filters, connection.granted):
                yield Finding(shortfall.level, f"MQTT: {shortfall}")
            if connection.session_present:
                yield Finding(
                    "ok",
                    f"broker {address} accepts the connection; the broker makes the user name the client id, so its"
                    " session was left as it is, and no subscription was tried",
                )
                return
        watch = DropWatch((), ask_after_s=0.0)
        alone = guest.model_copy(update={"mqtt_shared_group": None})  # it must not be dealt a share of the messages
        with visit(alone, filters=filters, lasting=False, drops=watch) as connection:
            if (problem := hindrance(connection, settings)) is not None:
                yield Finding("problem", f"MQTT: {problem}")
                return
            yield Finding("ok", f"broker {address} accepts the subscriptions")
            yield from _drops(connection, watch)
    except SettingsError as error:
        yield from (Finding("problem", str(problem)) for problem in error.problems)
    except (OSError, UnicodeError) as error:
        reason = explain_unreachable(error, host=settings.mqtt_host, port=settings.mqtt_port)
        yield Finding("problem", f"MQTT: {reason}")


_NAMED_BY_USER = (
    "MQTT: the broker makes the user name the client id: all processes would be one client, and throw each other out."
    " Set BRIDGE_PROCESSES=1, or let this user choose its client ids (without use_username_as_clientid)."
)


def _drops(connection: BrokerConnection, watch: DropWatch) -> Iterator[Finding]:
    step_until(connection, lambda: watch.finished, timeout_s=DROPS_TIMEOUT_S)
    if watch.dropped:
        yield Finding(
            "warning",
            f"the broker has dropped {watch.dropped:,} messages since its start (of any client): a queue was full, and"
            " publishers were told that all is well. Raise its max_queued_messages and max_queued_bytes.",
        )
    elif watch.dropped == 0:
        yield Finding("ok", "the broker has dropped no message since its start")


# -- HTTP


def check_http(settings: Settings) -> Iterator[Finding]:
    """Whether the status page can be served: the port is free, or a bridge is already there."""
    if not settings.http_port:
        return
    address = f"{settings.http_host}:{settings.http_port}"
    try:
        family = socket.getaddrinfo(settings.http_host, settings.http_port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(family[4])
    except OSError as error:
        yield _who_is_there(settings, address, error)
    else:
        yield Finding("ok", f"the status page will be at http://{address}/")


def _who_is_there(settings: Settings, address: str, error: OSError) -> Finding:
    token = settings.http_token.get_secret_value() if settings.http_token else None
    try:
        state = fetch(settings.http_host, settings.http_port, token=token)
        return Finding("ok", f"a bridge is running at http://{address}/, state {state['state']}")
    except (NoStatus, KeyError):
        reason = error.strerror or str(error)
        return Finding("problem", f"HTTP_PORT: {address} cannot be listened on ({reason}). Choose another HTTP_PORT.")


def failed(error: BridgeError) -> list[Finding]:
    """The findings of a configuration that could not even be loaded."""
    problems = error.problems if isinstance(error, SettingsError) else [error]
    return [Finding("problem", str(problem)) for problem in problems]
