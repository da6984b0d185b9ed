"""What each error means: the table of DELIVERY.md, with errors that a real server cannot easily be made to raise."""

from __future__ import annotations

import socket
import ssl
import struct
from types import SimpleNamespace

import psycopg2
import pytest
from psycopg2.pool import PoolError

from mqtt_bridge.errors import (
    Failure,
    MessageError,
    Problem,
    SchemaError,
    SettingsError,
    SinkError,
    Verdict,
    classify,
    explain_refusal,
    explain_unreachable,
)


def diagnostics(**fields):
    names = ("message_primary", "message_detail", "constraint_name", "schema_name", "table_name", "column_name")
    return SimpleNamespace(**(dict.fromkeys(names) | fields))


def server_error(sqlstate, primary="something is wrong", *, kind=psycopg2.DatabaseError, **fields):
    """An error as psycopg2 raises it for a message of the server."""

    class Fabricated(kind):
        pgcode = sqlstate
        diag = diagnostics(message_primary=primary, **fields)

    return Fabricated(primary)


VERDICTS = {
    Verdict.RECONNECT: "08000 08003 08006 57P01 57P02 57P03 57P04 57P05 25P03 25006",
    Verdict.CONFLICT: "40001 40P01",
    Verdict.BUSY: "55P03 55006 57014",
    Verdict.RESOURCES: "53000 53100 53200 53300 53400",
    Verdict.BROKEN: "58000 58030 58P01 XX000 XX001 XX002",
    Verdict.CONFIGURATION: "42P01 42703 42501 42601 42804 3D000 3F000 28000 28P01 0A000 08P01 22P03",
    Verdict.ROW: "22001 22003 22008 22012 22021 22P02 22P05 23502 23503 23505 23P01 21000 44000 54000 54001 P0001",
    Verdict.UNKNOWN: "P0002 ZZ999 23001 25001 25P02 40002 55000 F0000 HV000",
}


@pytest.mark.parametrize(
    ("sqlstate", "verdict"), [(code, verdict) for verdict, codes in VERDICTS.items() for code in codes.split()]
)
def test_an_sqlstate_has_a_verdict_while_the_connection_is_open(sqlstate, verdict):
    failure = classify(server_error(sqlstate), connected=True)

    assert (failure.verdict, failure.sqlstate) == (verdict, sqlstate)
    assert failure.sentence == "PostgreSQL says: something is wrong."


@pytest.mark.parametrize("sqlstate", ["22001", "42P01", "40001", "53300", "57P01", "08P01", "XX000", None])
def test_a_closed_connection_decides_before_any_sqlstate(sqlstate):
    assert classify(server_error(sqlstate), connected=False).verdict is Verdict.RECONNECT


def test_a_check_without_a_constraint_is_a_missing_partition():
    no_partition = server_error("23514", 'no partition of relation "readings" found for row', table_name="readings")
    check = server_error("23514", "violates check constraint", constraint_name="positive")

    assert classify(no_partition, connected=True).verdict is Verdict.CONFIGURATION
    assert "default partition" in classify(no_partition, connected=True).remedy
    assert classify(check, connected=True).verdict is Verdict.ROW


def test_a_row_at_fault_is_given_no_remedy_that_is_meant_for_partitions():
    check = server_error("23514", "violates check constraint", constraint_name="positive")

    assert classify(check, connected=True).remedy == ""


def test_the_detail_of_the_server_is_part_of_the_sentence():
    error = server_error("23505", "duplicate key", message_detail="Key (a)=(1) already exists.")

    assert "Key (a)=(1) already exists" in classify(error, connected=True).sentence


@pytest.mark.parametrize("kind", [psycopg2.OperationalError, psycopg2.InterfaceError])
@pytest.mark.parametrize("connected", [True, False])
def test_an_error_of_the_driver_without_a_code_is_a_lost_connection(kind, connected):
    assert classify(kind("server closed the connection unexpectedly"), connected=connected).verdict is Verdict.RECONNECT


def test_other_errors_of_the_driver_are_about_the_row_or_unknown():
    assert classify(psycopg2.DataError("too large"), connected=True).verdict is Verdict.ROW
    assert classify(psycopg2.InternalError("?"), connected=True).verdict is Verdict.UNKNOWN
    assert classify(PoolError("exhausted"), connected=False).verdict is Verdict.RECONNECT


def test_a_value_that_cannot_be_adapted_is_the_rows_fault():
    error = psycopg2.ProgrammingError("can't adapt type 'object'")

    assert classify(error, connected=True).verdict in (Verdict.ROW, Verdict.UNKNOWN), "both take the batch apart"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("A string literal cannot contain NUL (0x00) characters."),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
        OverflowError("int too large to convert to float"),
        struct.error("required argument is not a float"),
        TypeError("a bytes-like object is required"),
    ],
)
def test_what_is_raised_while_rows_are_built_is_the_rows_fault(error):
    failure = classify(error, connected=True)

    assert failure.verdict is Verdict.ROW
    assert type(error).__name__ in failure.sentence


def test_errors_that_nobody_foresaw_are_unknown():
    assert classify(KeyError("x"), connected=True).verdict is Verdict.UNKNOWN


@pytest.mark.parametrize(
    "error",
    [
        SinkError("x"),
        SchemaError("x"),
        SettingsError([Problem("DATABASE_URL_FILE", "/x", "It is gone.", "Put it back.")]),
    ],
)
def test_what_the_bridge_itself_finds_wrong_is_configuration_in_its_own_words(error):
    failure = classify(error, connected=True)

    assert failure.verdict is Verdict.CONFIGURATION
    assert str(failure) == str(error)


TEXTS = [
    ('FATAL:  password authentication failed for user "u"', "DATABASE_URL"),
    ("fe_sendauth: no password supplied", "PGPASSFILE"),
    ('FATAL:  database "x" does not exist', "Create the database"),
    ('FATAL:  role "x" does not exist', "Create the role"),
    ('FATAL:  role "x" is not permitted to log in', "LOGIN"),
    ('FATAL:  no pg_hba.conf entry for host "10.0.0.1", user "u", database "d", no encryption', "pg_hba.conf"),
    ("FATAL:  sorry, too many clients already", "DB_POOL_SIZE"),
    ("FATAL:  no more connections allowed (max_client_conn)", "pgbouncer.ini"),
    ("FATAL:  unsupported startup parameter: options", "ignore_startup_parameters"),
    ("FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute", "DB_POOL_SIZE"),
    ('could not translate host name "x" to address: Name or service not known', "PGHOST"),
    ("server does not support SSL, but SSL was required", "PGSSLMODE"),
    ("SSL error: certificate verify failed", "sslrootcert"),
    ("FATAL:  the database system is starting up", "in a moment"),
    ("FATAL:  the database system is shutting down", "in a moment"),
    ("FATAL:  the database system is not yet accepting connections", "in a moment"),
    ("Connection refused\n\tIs the server running on that host and accepting TCP/IP connections?", "PGPORT"),
    ("timeout expired", "firewall"),
    ("Connection timed out", "firewall"),
    ("No route to host", "firewall"),
    ('invalid connection option "x"', "Correct DATABASE_URL"),
]


@pytest.mark.parametrize(("text", "remedy"), TEXTS)
def test_known_texts_of_failed_connects_bring_their_remedy(text, remedy):
    error = psycopg2.OperationalError(f'connection to server at "db" (10.0.0.2), port 5432 failed: {text}\n')

    failure = classify(error, connected=False)

    assert failure.verdict is Verdict.RECONNECT
    assert remedy in failure.remedy
    assert "\n" not in failure.sentence


def test_an_unknown_text_is_shown_without_a_remedy():
    failure = classify(psycopg2.OperationalError("something new"), connected=False)

    assert failure == Failure(Verdict.RECONNECT, "PostgreSQL: something new.")


def test_an_error_without_any_text_is_still_a_sentence():
    assert classify(psycopg2.OperationalError(), connected=False).sentence == "PostgreSQL: OperationalError."


@pytest.mark.parametrize(
    ("sqlstate", "remedy"),
    [
        ("42501", "DATABASE_URL"),
        ("42P01", "DB_AUTO_CREATE"),
        ("42703", "mqtt-bridge schema"),
        ("3F000", "DB_AUTO_CREATE"),
        ("3D000", "DATABASE_URL"),
        ("28P01", "DATABASE_URL"),
        ("08P01", "mqtt-bridge check"),
        ("53100", "disk"),
        ("53300", "DB_POOL_SIZE"),
        ("25006", "DATABASE_URL"),
    ],
)
def test_known_codes_bring_their_remedy(sqlstate, remedy):
    assert remedy in classify(server_error(sqlstate), connected=True).remedy


# -- messages and settings


def test_a_message_error_has_a_stage_and_a_route():
    error = MessageError("no JSON", route="default")

    assert (str(error), error.stage, error.route) == ("no JSON", "decode", "default")


def test_settings_errors_list_every_problem():
    problems = [Problem("A", "1", "Wrong.", "Mend it."), Problem("B", "", "Missing.", "Set it.")]

    assert str(SettingsError(problems)) == "A=1: Wrong. Mend it.\nB: Missing. Set it."


# -- the broker


@pytest.mark.parametrize(
    ("reason", "setting"),
    [
        ("Not authorized", "MQTT_USERNAME"),
        ("Bad user name or password", "MQTT_PASSWORD"),
        ("Client identifier not valid", "MQTT_CLIENT_ID"),
        ("Unsupported protocol version", "MQTT_PROTOCOL"),
        ("Something new", "broker's log"),
    ],
)
def test_a_refusal_of_the_broker_names_the_setting(reason, setting):
    assert setting in explain_refusal(reason)
    assert reason in explain_refusal(reason)


@pytest.mark.parametrize(
    ("error", "setting"),
    [
        (socket.gaierror(-2, "Name or service not known"), "MQTT_HOST"),
        (UnicodeError("label too long"), "MQTT_HOST"),
        (ssl.SSLCertVerificationError(1, "unable to get local issuer certificate"), "MQTT_TLS_CA"),
        (ssl.SSLError(1, "wrong version number"), "MQTT_PORT"),
        (ConnectionRefusedError(111, "refused"), "MQTT_PORT"),
        (TimeoutError(), "firewall"),
        (OSError(113, "No route to host"), "MQTT_HOST"),
        (OSError(), "OSError"),
    ],
)
def test_a_broker_that_cannot_be_reached_is_explained_with_the_setting(error, setting):
    if isinstance(error, ssl.SSLError):
        error.reason = error.verify_message = "as OpenSSL says it"

    assert setting in explain_unreachable(error, host="broker", port=8883)
