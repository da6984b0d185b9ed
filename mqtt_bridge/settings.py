"""Settings: read once from the environment and `.env`, checked completely, never changed afterwards.

The environment wins over `.env`; an empty value means "not set". `load` reports every problem at once, each with what
to do about it. Secrets are masked in every repr, error and listing; those that come from files are read again by
`mqtt_credentials` and `dsn`, so that a rotated secret is taken up at the next reconnect. No other module reads the
environment. `Settings` is immutable: any thread may use it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, get_args

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from mqtt_bridge import dsn
from mqtt_bridge.errors import Problem, SettingsError
from mqtt_bridge.topics import TopicPattern, covering, covers, overlaps

MAX_QUEUE_SIZE = 30_000
"""Most messages that may be unacknowledged: beyond it the distance between two 16-bit packet ids is ambiguous."""


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_LOWER = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
_SPLIT = BeforeValidator(lambda value: [part.strip() for part in value.split(",")] if isinstance(value, str) else value)


class Settings(BaseModel):
    """Every setting; the attribute `mqtt_host` is the setting MQTT_HOST.

    `load` makes it from the environment; tests may construct it directly, which checks types and ranges only. A
    default that depends on another setting stands below that setting.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    bridge_routes: str | None = Field(
        None, description="Routes file (TOML) or preset:NAME; unset, MQTT_TOPICS says what to store."
    )
    bridge_workers: int = Field(
        default_factory=lambda: 3 if _cores() >= 4 else 2,
        ge=1,
        le=64,
        description="Threads that store batches.",
        json_schema_extra={"default": "2, on four cores or more 3"},
    )
    bridge_batch_size: int = Field(2000, ge=1, le=MAX_QUEUE_SIZE, description="Most messages in one transaction.")
    bridge_batch_wait_ms: int = Field(
        5, ge=0, le=60_000, description="Milliseconds a batch waits for more messages before it is stored."
    )
    bridge_queue_size: int = Field(
        20_000, ge=100, description="Most messages held in memory, 100 to 30000; beyond it the bridge stops reading."
    )
    bridge_queue_mb: int = Field(64, ge=1, le=65_536, description="Most megabytes of messages held in memory.")
    bridge_max_values: int = Field(
        10_000, ge=1, le=1_000_000, description="Most values in one message; more is a dead letter."
    )
    bridge_max_depth: int = Field(
        64, ge=1, le=256, description="Most levels of nesting in one message; more is a dead letter."
    )
    bridge_dead_letter_days: int = Field(
        90, ge=0, le=36_500, description="Days that dead letters are kept; 0 keeps them for ever."
    )
    bridge_processes: int = Field(
        1, ge=1, le=64, description="Processes, each with its own client id (MQTT_CLIENT_ID-1, -2 ...)."
    )
    bridge_shutdown_s: int = Field(
        20, ge=1, le=3600, description="Seconds a shutdown may take to store what was received."
    )
    bridge_spool: Annotated[Literal["off", "outage", "always"], _LOWER] = Field(
        "off", description="Disk buffer: off, outage (while the database is away) or always."
    )
    bridge_spool_dir: Path | None = Field(
        None, description="Directory of the disk buffer; what is found there is stored, also with BRIDGE_SPOOL=off."
    )
    bridge_spool_max_mb: int = Field(1024, ge=1, description="Most megabytes of the disk buffer.")

    mqtt_host: str = Field("localhost", description="Host name or address of the broker.")
    mqtt_tls: bool = Field(False, description="Whether to connect over TLS.")
    mqtt_port: int = Field(
        default_factory=lambda given: 8883 if given["mqtt_tls"] else 1883,
        ge=1,
        le=65_535,
        description="Port of the broker.",
        json_schema_extra={"default": "1883, with MQTT_TLS=true 8883"},
    )
    mqtt_tls_ca: Path | None = Field(
        None, description="PEM file of the authorities that vouch for the broker; unset, those of the system."
    )
    mqtt_tls_cert: Path | None = Field(None, description="PEM file of the bridge's own certificate.")
    mqtt_tls_key: Path | None = Field(None, description="PEM file of the private key of MQTT_TLS_CERT.")
    mqtt_transport: Annotated[Literal["tcp", "websockets"], _LOWER] = Field(
        "tcp", description="How to reach the broker: tcp or websockets."
    )
    mqtt_ws_path: str = Field("/mqtt", description="Path of the broker's websocket; used by websockets only.")
    mqtt_protocol: Literal["5", "3.1.1"] = Field("5", description="Version of MQTT to speak: 5 or 3.1.1.")
    mqtt_client_id: str = Field(
        "mqtt-bridge", description="Name of the bridge's session at the broker; one bridge each, and stable."
    )
    mqtt_username: str | None = Field(None, description="User name at the broker.")
    mqtt_username_file: Path | None = Field(None, description="File that holds MQTT_USERNAME.")
    mqtt_password: SecretStr | None = Field(None, description="Password at the broker.")
    mqtt_password_file: Path | None = Field(None, description="File that holds MQTT_PASSWORD.")
    mqtt_topics: Annotated[tuple[str, ...], _SPLIT] = Field(
        ("devices/{device}/telemetry",),
        description="Comma separated topics to store; {device} names a level, + and # are allowed.",
    )
    mqtt_qos: int = Field(1, ge=0, le=2, description="Quality of service of the subscriptions: 1, or 0 (may lose).")
    mqtt_keepalive_s: int = Field(30, ge=5, le=65_535, description="Seconds between signs of life to the broker.")
    mqtt_session_expiry_s: int = Field(
        604_800, ge=0, le=4_294_967_295, description="Seconds the broker keeps the session of an absent bridge."
    )
    mqtt_receive_maximum: int = Field(
        default_factory=lambda given: min(max(1, given["bridge_queue_size"] // 2), MAX_QUEUE_SIZE),
        ge=1,
        le=MAX_QUEUE_SIZE,
        description="Most messages the broker may send ahead of their acknowledgement (MQTT 5).",
        json_schema_extra={"default": "half of BRIDGE_QUEUE_SIZE"},
    )
    mqtt_shared_group: str | None = Field(
        None,
        description="Group of an MQTT 5 shared subscription, for several bridges side by side; unset, several processes"
        " take MQTT_CLIENT_ID.",
    )
    mqtt_retained: Annotated[Literal["once", "always", "never"], _LOWER] = Field(
        "once", description="Whether replayed retained messages are stored: once for each filter, always or never."
    )
    mqtt_redelivery: Annotated[Literal["marked", "unmarked", "renumbered"], _LOWER] = Field(
        "marked",
        description="How the broker redelivers: marked (DUP set), unmarked (without DUP) or renumbered (new ids).",
    )

    mqtt_receive: Annotated[Literal["fast", "stock"], _LOWER] = Field(
        "fast", description="How packets are read: fast, or stock (paho's own reading: ten times the CPU)."
    )

    database_url: SecretStr | None = Field(
        None, description="URL or key=value string of the database; unset, libpq's PGHOST, PGUSER ... are used."
    )
    database_url_file: Path | None = Field(None, description="File that holds DATABASE_URL.")
    db_pool_size: int = Field(
        default_factory=lambda given: given["bridge_workers"] + 2,
        ge=1,
        le=1000,
        description="Connections to the database.",
        json_schema_extra={"default": "BRIDGE_WORKERS + 2"},
    )
    db_auto_create: bool = Field(True, description="Whether missing tables are created at start.")
    db_statement_timeout_s: int = Field(
        30, ge=1, le=2_147_483, description="Seconds after which PostgreSQL ends a statement."
    )

    http_host: str = Field("127.0.0.1", description="Address of the status page and of the metrics.")
    http_port: int = Field(8080, ge=0, le=65_535, description="Port of the status page and of the metrics; 0 is off.")
    http_token: SecretStr | None = Field(None, description="Bearer token that the status page asks for.")
    http_token_file: Path | None = Field(None, description="File that holds HTTP_TOKEN.")

    log_level: Annotated[Literal["debug", "info", "warning", "error"], _LOWER] = Field(
        "info", description="Least important messages to log: debug, info, warning or error."
    )
    log_format: Annotated[Literal["console", "json"], _LOWER] = Field(
        "console", description="Logs for people (console) or for machines (json)."
    )

    _environ: Mapping[str, str] = PrivateAttr(default_factory=dict)
    """libpq's PG* variables that are in the environment; libpq reads them itself."""
    _dotenv: Mapping[str, str] = PrivateAttr(default_factory=dict)
    """Those that are only in `.env`, where libpq cannot see them."""

    def mqtt_credentials(self) -> tuple[str | None, str | None]:
        """User name and password as of now; SettingsError when a file that holds one cannot be read."""
        return self._current("mqtt_username"), self._current("mqtt_password")

    def dsn(self) -> str:
        """The complete libpq connection string as of now; SettingsError when it cannot be read or is malformed."""
        url = self._current("database_url") or ""
        _raise_if(list(_dsn_problems(url)))
        return dsn.complete(url, environ=self._environ, dotenv=self._dotenv)

    def _current(self, name: str) -> str | None:
        path = getattr(self, f"{name}_file")
        if path is not None:
            return _read_secret(name, path)
        value = getattr(self, name)
        return value.get_secret_value() if isinstance(value, SecretStr) else value


NAMES = tuple(name.upper() for name in Settings.model_fields)
"""The name of every setting, as it stands in the environment."""

_SECRETS = ("mqtt_username", "mqtt_password", "database_url", "http_token")
"""Settings that may also come from a file, NAME_FILE."""

_NOT_IN_THIS_VERSION = {
    # Remove the line of what has been built: nothing else keeps it from being used.
    "bridge_routes": "Leave BRIDGE_ROUTES empty and list the topics in MQTT_TOPICS.",
}


@dataclass(frozen=True, slots=True)
class EffectiveSetting:
    """One setting as a person wants to see it; secrets are masked."""

    name: str
    value: str
    """As it would stand in `.env`; empty when unset."""
    default: str
    """The same for the default, or a phrase where it depends on another setting."""
    description: str
    given: bool
    """False when the value is the default because nothing was given."""


def load(environ: Mapping[str, str] | None = None, env_file: str | Path | None = ".env") -> Settings:
    """Read and check everything; SettingsError with every problem found."""
    environ = os.environ if environ is None else environ
    dotenv = _read_dotenv(env_file)
    values, problems = _with_secrets(_given({**dotenv, **environ}))
    settings, wrong = _validate(values)
    problems += wrong
    problems += _broken_rules(settings, {problem.setting for problem in problems})
    _raise_if(problems)
    settings._environ = {name: environ[name] for name in dsn.LIBPQ_VARIABLES if environ.get(name)}
    settings._dotenv = {name: dotenv[name] for name in dsn.LIBPQ_VARIABLES if name in dotenv and name not in environ}
    return settings


def inheritance(environ: Mapping[str, str] | None = None, env_file: str | Path | None = ".env") -> dict[str, str]:
    """The environment for a subprocess that is to have these settings, also if `.env` should change meanwhile.

    Secrets stay where they are: in the environment, or in files that are named there. What is not set is empty, which
    means the default, so that no `.env` can set it.
    """
    environ = os.environ if environ is None else environ
    dotenv = _read_dotenv(env_file)
    unset = {name: "" for name in NAMES if name != "MQTT_CLIENT_ID"}
    given = {name: dotenv[name] for name in NAMES if name in dotenv}
    # libpq reads these itself, where an empty value is a value.
    given |= {name: dotenv[name] for name in dsn.LIBPQ_VARIABLES if dotenv.get(name)}
    return {**unset, **given, **environ}


def with_client_id(settings: Settings, client_id: str) -> Settings:
    """The same for another client id; SettingsError when it cannot be one."""
    other = settings.model_copy(update={"mqtt_client_id": client_id})
    _raise_if(list(_check_client_id(other)))
    return other


def unknown_names(environ: Mapping[str, str] | None = None, env_file: str | Path | None = ".env") -> list[Problem]:
    """Names that look like settings but are none, most likely mistyped: warnings. Their values are never shown."""
    environ = os.environ if environ is None else environ
    suspects = {name for name in environ if name.upper().startswith(("MQTT_", "DB_", "BRIDGE_"))}
    # The environment of any program may hold HTTP_PROXY, LOG_DIR or PGTZ; in `.env` they can only be meant for us.
    suspects |= {name for name in _read_dotenv(env_file) if name.upper().startswith(_PREFIXES)}
    return [_unknown(name) for name in sorted(suspects - set(NAMES) - set(dsn.LIBPQ_VARIABLES))]


def describe(settings: Settings) -> list[EffectiveSetting]:
    """Every setting with its value, default and meaning; secrets masked. `describe(Settings())` is the reference."""
    return [
        EffectiveSetting(
            name=name.upper(),
            value=_text(name, getattr(settings, name)),
            default=_default(name, field),
            description=field.description or "",
            given=name in settings.model_fields_set,
        )
        for name, field in Settings.model_fields.items()
    ]


# --- Where values come from ------------------------------------------------------------------------------------------

_PREFIXES = ("MQTT_", "DB_", "DATABASE_", "BRIDGE_", "HTTP_", "LOG_", "PG")


def _read_dotenv(env_file: str | Path | None) -> dict[str, str]:
    if env_file is None:
        return {}
    try:
        text = Path(env_file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([_unreadable(str(env_file), "", error)]) from error
    _raise_if(list(_dotenv_problems(str(env_file), text)))
    return {name: value for name, value in dotenv_values(stream=io.StringIO(text)).items() if value is not None}


def _dotenv_problems(env_file: str, text: str) -> Iterator[Problem]:
    # The line itself is not shown: it may hold a secret.
    for binding in parse_stream(io.StringIO(text)):
        if binding.error:
            place = f"{env_file} line {binding.original.line}"
            yield Problem(place, "", "The line cannot be read.", "Write it as NAME=value, and close its quotes.")


def _given(names: Mapping[str, str]) -> dict[str, str]:
    """The values that are set, by attribute name. Empty means unset, except for a client id (see its rule)."""
    known = {name.lower(): names[name] for name in NAMES if name in names}
    return {name: value for name, value in known.items() if value.strip() or name == "mqtt_client_id"}


def _with_secrets(values: dict[str, str]) -> tuple[dict[str, str], list[Problem]]:
    """The values, and those that stand in files of their own."""
    problems = []
    read = {}
    for name in _SECRETS:
        try:
            if f"{name}_file" in values:
                _refuse_both(name, values)
                read[name] = _read_secret(name, Path(values[f"{name}_file"]))
        except SettingsError as error:
            problems += error.problems
    return values | read, problems


def _refuse_both(name: str, values: dict[str, str]) -> None:
    if name in values:
        both = f"{name.upper()} is set as well, and only one of them can be right."
        raise SettingsError([_problem(f"{name}_file", values[f"{name}_file"], both, "Remove one of the two.")])


def _read_secret(name: str, path: Path) -> str:
    """The content of a secret's file, without one trailing newline."""
    setting = f"{name}_file".upper()
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([_unreadable(setting, path, error)]) from error
    if not text.strip() or "\0" in text:
        fault = "The file is empty." if not text.strip() else "The file contains NUL characters."
        raise SettingsError([_problem(setting, path, fault, f"Write {name.upper()} into it, as text.")])
    return text


# --- Types and ranges ------------------------------------------------------------------------------------------------


def _validate(values: dict[str, str]) -> tuple[Settings, list[Problem]]:
    """The settings and what is wrong with them; what is wrong is at its default, so that the rest can be judged."""
    try:
        return Settings.model_validate(values), []
    except ValidationError as error:
        # A default that could not be derived follows from another problem, and is none itself.
        wrong = {
            str(fault["loc"][0]): fault["type"]
            for fault in error.errors(include_url=False)
            if fault["type"] != "default_factory_not_called"
        }
    good = {name: value for name, value in values.items() if name not in wrong}
    return Settings.model_validate(good), [_type_problem(name, values[name], fault) for name, fault in wrong.items()]


def _type_problem(name: str, value: str, fault: str) -> Problem:
    remedy = f"Set {_expected(Settings.model_fields[name])}."
    if value.startswith("tcp://"):
        remedy += " (Kubernetes sets this for a Service of that name: set enableServiceLinks to false.)"
    return _problem(name, value, _FAULTS.get(fault, "It is not a whole number."), remedy)


_FAULTS = {
    "greater_than_equal": "It is out of range.",
    "less_than_equal": "It is out of range.",
    "bool_parsing": "It is neither true nor false.",
    "literal_error": "There is no such choice.",
}


def _expected(field: FieldInfo) -> str:
    if field.annotation is bool:
        return "true or false"
    if field.annotation is not int:
        return "one of " + ", ".join(get_args(field.annotation))
    limits = {key: getattr(limit, key) for limit in field.metadata for key in ("ge", "le") if hasattr(limit, key)}
    if "le" not in limits:
        return f"a whole number of {limits['ge']} or more"
    return f"a whole number from {limits['ge']} to {limits['le']}"


# --- Rules -----------------------------------------------------------------------------------------------------------


def _broken_rules(settings: Settings, wrong: set[str]) -> Iterator[Problem]:
    """The problems that types and ranges do not show. What is wrong already is not judged again."""
    for rule, reads in _RULES:
        if not wrong.intersection(reads.upper().split()):
            yield from rule(settings)


def _check_version(settings: Settings) -> Iterator[Problem]:
    defaults = Settings()
    for name, remedy in _NOT_IN_THIS_VERSION.items():
        value = getattr(settings, name)
        if value != getattr(defaults, name):
            yield _problem(name, value, "It is not available in this version.", remedy)


def _check_routes(settings: Settings) -> Iterator[Problem]:
    if settings.bridge_routes and "mqtt_topics" in settings.model_fields_set:
        both = "MQTT_TOPICS is set as well, and the routes already say what to subscribe to."
        yield _problem("bridge_routes", settings.bridge_routes, both, "Remove one of the two.")


def _check_topics(settings: Settings) -> Iterator[Problem]:
    filters: list[str] = []
    for topic in settings.mqtt_topics:
        try:
            filters.append(TopicPattern.parse(topic).filter)
        except ValueError as error:
            remedy = "Write topics like devices/{device}/telemetry, with commas between them."
            yield _problem("mqtt_topics", topic, str(error), remedy)
    yield from _check_overlaps(dict.fromkeys(filters))


def _check_overlaps(filters: Iterable[str]) -> Iterator[Problem]:
    """The broker delivers a message once for each filter that it matches (MQTT 5, section 3.3.4)."""
    for one, other in combinations(filters, 2):
        if overlaps(one, other) and not covers(one, other) and not covers(other, one):
            wider = covering(one, other)
            if not any(covers(name, wider) for name in filters):
                problem = f"{one} and {other} overlap: what matches both would be delivered and stored twice."
                yield _problem("mqtt_topics", f"{one},{other}", problem, f"Add {wider}, which covers both, at the end.")


def _check_queue_size(settings: Settings) -> Iterator[Problem]:
    if settings.bridge_queue_size > MAX_QUEUE_SIZE:
        why = f"MQTT's 16-bit packet ids cannot be told apart beyond {MAX_QUEUE_SIZE} unacknowledged messages."
        remedy = f"Set a whole number from 100 to {MAX_QUEUE_SIZE}."
        yield _problem("bridge_queue_size", settings.bridge_queue_size, why, remedy)


def _check_host(settings: Settings) -> Iterator[Problem]:
    host = settings.mqtt_host
    if re.search(r"[\s/\[\]]", host) or host.count(":") == 1:
        remedy = "Set the host alone; MQTT_PORT, MQTT_TLS and MQTT_TRANSPORT say the rest."
        yield _problem("mqtt_host", host, "It is not a host name or an address.", remedy)


def _check_ws_path(settings: Settings) -> Iterator[Problem]:
    if not settings.mqtt_ws_path.startswith("/"):
        yield _problem("mqtt_ws_path", settings.mqtt_ws_path, "It is not a path.", "Begin it with a slash: /mqtt.")


def _check_tls(settings: Settings) -> Iterator[Problem]:
    for name in ("mqtt_tls_ca", "mqtt_tls_cert", "mqtt_tls_key"):
        path = getattr(settings, name)
        if path is not None:
            yield from _check_tls_file(name, path) if settings.mqtt_tls else _unused_tls_file(name, path)


def _check_tls_file(name: str, path: Path) -> Iterator[Problem]:
    try:
        path.open("rb").close()
    except OSError as error:
        yield _unreadable(name.upper(), path, error)


def _unused_tls_file(name: str, path: Path) -> Iterator[Problem]:
    remedy = f"Set MQTT_TLS=true, or remove {name.upper()}."
    yield _problem(name, path, "It is given, but MQTT_TLS is false: the connection would be in the clear.", remedy)


def _check_tls_pair(settings: Settings) -> Iterator[Problem]:
    if settings.mqtt_tls_cert and not settings.mqtt_tls_key:
        yield _problem("mqtt_tls_cert", settings.mqtt_tls_cert, "It has no key.", "Set MQTT_TLS_KEY as well.")
    if settings.mqtt_tls_key and not settings.mqtt_tls_cert:
        yield _problem("mqtt_tls_key", settings.mqtt_tls_key, "It has no certificate.", "Set MQTT_TLS_CERT as well.")


def _check_client_id(settings: Settings) -> Iterator[Problem]:
    client_id = settings.mqtt_client_id
    remedy = "Set a name that no other client of this broker has, or remove the line to get mqtt-bridge."
    if not client_id.strip():
        # Most likely a variable that expanded to nothing: the default could take over another bridge's session.
        yield _problem("mqtt_client_id", "", "It is empty: the broker could not keep a session for it.", remedy)
    elif not client_id.isprintable():
        yield _problem("mqtt_client_id", client_id, "It contains characters that MQTT forbids.", remedy)


def _check_password(settings: Settings) -> Iterator[Problem]:
    if settings.mqtt_protocol == "3.1.1" and settings.mqtt_password and not settings.mqtt_username:
        fault = "MQTT 3.1.1 allows no password without a user name [MQTT-3.1.2-22]."
        yield _problem("mqtt_password", "***", fault, "Set MQTT_USERNAME as well, or MQTT_PROTOCOL=5.")


def _check_qos(settings: Settings) -> Iterator[Problem]:
    if settings.mqtt_qos == 2:
        why = "QoS 2 subscriptions are refused: paho keeps QoS 2 state in memory only, and a crash would lose messages."
        yield _problem("mqtt_qos", 2, why, "Set 1: it stores each message once, also from publishers with QoS 2.")


def _check_session_expiry(settings: Settings) -> Iterator[Problem]:
    if settings.mqtt_session_expiry_s == 0:
        why = "The broker would forget the session, and every message waiting in it, at each disconnect."
        yield _problem("mqtt_session_expiry_s", 0, why, "Set how long the bridge may be away, as 604800 for a week.")


def _check_spool(settings: Settings) -> Iterator[Problem]:
    if settings.bridge_spool != "off" and settings.bridge_spool_dir is None:
        remedy = "Set BRIDGE_SPOOL_DIR to a directory on a local disk that survives restarts, of this bridge alone."
        yield _problem("bridge_spool", settings.bridge_spool, "The disk buffer has no directory.", remedy)


def _check_shared_group(settings: Settings) -> Iterator[Problem]:
    group = settings.mqtt_shared_group
    if group and re.search(r"[/+#\0]", group):
        yield _problem("mqtt_shared_group", group, "A group must not contain / + or #.", "Set a plain name.")
    if group and settings.mqtt_protocol != "5":
        remedy = "Set MQTT_PROTOCOL=5, or remove MQTT_SHARED_GROUP."
        yield _problem("mqtt_shared_group", group, "Shared subscriptions need MQTT 5.", remedy)


def _check_processes(settings: Settings) -> Iterator[Problem]:
    if settings.bridge_processes == 1:
        return
    if settings.mqtt_protocol != "5":
        why = "Several processes share the load by a shared subscription, which needs MQTT 5."
        yield _problem("bridge_processes", settings.bridge_processes, why, "Set MQTT_PROTOCOL=5, or 1 process.")
    if not settings.mqtt_shared_group and re.search(r"[/+#]", settings.mqtt_client_id):
        why = "It is also the group of the processes' shared subscription, which must not contain / + or #."
        remedy = "Set MQTT_SHARED_GROUP to a plain name."
        yield _problem("mqtt_client_id", settings.mqtt_client_id, why, remedy)


def _check_database_url(settings: Settings) -> Iterator[Problem]:
    if settings.database_url:
        yield from _dsn_problems(settings.database_url.get_secret_value())


_RULES: tuple[tuple[Callable[[Settings], Iterator[Problem]], str], ...] = (
    # Each with the settings it reads.
    (_check_version, "bridge_routes"),
    (_check_spool, "bridge_spool bridge_spool_dir"),
    (_check_routes, "bridge_routes mqtt_topics"),
    (_check_topics, "mqtt_topics"),
    (_check_queue_size, "bridge_queue_size"),
    (_check_host, "mqtt_host"),
    (_check_ws_path, "mqtt_ws_path"),
    (_check_tls, "mqtt_tls"),
    (_check_tls_pair, "mqtt_tls_cert mqtt_tls_key"),
    (_check_client_id, "mqtt_client_id"),
    (_check_password, "mqtt_protocol mqtt_username_file mqtt_password_file"),
    (_check_qos, "mqtt_qos"),
    (_check_session_expiry, "mqtt_session_expiry_s"),
    (_check_shared_group, "mqtt_protocol mqtt_shared_group"),
    (_check_processes, "bridge_processes mqtt_protocol mqtt_client_id mqtt_shared_group"),
    (_check_database_url, "database_url"),
)


def _dsn_problems(url: str) -> Iterator[Problem]:
    form = "postgresql://user:password@host:5432/database"
    remedy = f"Write it as {form}, with special characters percent-encoded (%40 for @, %2F for /)."
    if fault := dsn.fault(url):
        yield _problem("database_url", dsn.masked(url), fault, remedy)


# --- For people ------------------------------------------------------------------------------------------------------


def _problem(name: str, value: object, problem: str, remedy: str) -> Problem:
    shown = str(value)
    return Problem(name.upper(), shown if len(shown) <= 200 else f"{shown[:200]}...", problem, remedy)


def _unreadable(place: str, value: object, error: OSError | UnicodeDecodeError) -> Problem:
    reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
    remedy = "Name a file that exists and that the bridge may read."
    return Problem(place, str(value), f"The file cannot be read ({reason}).", remedy)


def _unknown(name: str) -> Problem:
    close = get_close_matches(name.upper(), NAMES, n=1, cutoff=0.7)
    remedy = f"Did you mean {close[0]}?" if close else "Remove it, or look its name up in .env.example."
    return Problem(name, "", "There is no such setting; it has no effect.", remedy)


def _text(name: str, value: object) -> str:
    if isinstance(value, SecretStr):
        return dsn.masked(value.get_secret_value()) if name == "database_url" else "***"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is None else str(value)


def _default(name: str, field: FieldInfo) -> str:
    if isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["default"])
    return _text(name, field.get_default())


def _raise_if(problems: list[Problem]) -> None:
    if problems:
        raise SettingsError(problems)
