"""The connection string for libpq: what DATABASE_URL, the environment and `.env` make together.

Pure functions. What is shown of a connection string never holds a password, however malformed it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

_DEFAULTS = {
    # A server that is gone is noticed within half a minute instead of libpq's two hours.
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "application_name": "mqtt-bridge",
}

LIBPQ_VARIABLES = {
    # https://www.postgresql.org/docs/current/libpq-envars.html
    "PGHOST": "host",
    "PGHOSTADDR": "hostaddr",
    "PGPORT": "port",
    "PGDATABASE": "dbname",
    "PGUSER": "user",
    "PGPASSWORD": "password",
    "PGPASSFILE": "passfile",
    "PGREQUIREAUTH": "require_auth",
    "PGCHANNELBINDING": "channel_binding",
    "PGSERVICE": "service",
    "PGOPTIONS": "options",
    "PGAPPNAME": "application_name",
    "PGCLIENTENCODING": "client_encoding",
    "PGCONNECT_TIMEOUT": "connect_timeout",
    "PGTARGETSESSIONATTRS": "target_session_attrs",
    "PGLOADBALANCEHOSTS": "load_balance_hosts",
    "PGSSLMODE": "sslmode",
    "PGSSLNEGOTIATION": "sslnegotiation",
    "PGSSLROOTCERT": "sslrootcert",
    "PGSSLCERT": "sslcert",
    "PGSSLKEY": "sslkey",
    "PGSSLCERTMODE": "sslcertmode",
    "PGSSLCRL": "sslcrl",
    "PGSSLCRLDIR": "sslcrldir",
    "PGSSLSNI": "sslsni",
    "PGSSLMINPROTOCOLVERSION": "ssl_min_protocol_version",
    "PGSSLMAXPROTOCOLVERSION": "ssl_max_protocol_version",
    "PGREQUIREPEER": "requirepeer",
    "PGGSSENCMODE": "gssencmode",
    "PGGSSDELEGATION": "gssdelegation",
    "PGGSSLIB": "gsslib",
    "PGKRBSRVNAME": "krbsrvname",
}


def complete(url: str, *, environ: Mapping[str, str], dotenv: Mapping[str, str]) -> str:
    """The complete connection string: `url`, then libpq's variables, then the defaults of the bridge.

    Variables in `environ` libpq reads itself; those in `dotenv` it cannot see, so they become parameters.
    """
    given = _libpq_parameters(dotenv) | parse_dsn(url)
    in_environ = _libpq_parameters(environ)
    defaults = _DEFAULTS | _multi_host(in_environ | given)
    missing = {name: value for name, value in defaults.items() if name not in in_environ}
    # Rows are copied as UTF-8 bytes: under another client encoding the server would store something else.
    return make_dsn(**missing | given | {"client_encoding": "UTF8"})


def fault(url: str) -> str | None:
    """What is wrong with a DATABASE_URL, one sentence; None when it can be read."""
    try:
        parameters = parse_dsn(url)
    except (psycopg2.Error, UnicodeError) as error:
        return _complaint(url, error)
    if _URI.match(url) and "@" in parameters.get("dbname", "") and "%40" not in url:
        # To libpq the slash ends the host: what is left of the password would become the name of the database.
        return "A slash in its password is not percent-encoded."
    if not all(_is_port(port) for port in parameters.get("port", "").split(",") if port):
        return "Its port is not a number from 1 to 65535."
    return None


def _complaint(url: str, error: Exception) -> str:
    """libpq's own sentence, unless it could quote a piece of the password."""
    if masked(url) != url:
        return "It is not a connection string."
    return f"It is not a connection string: {str(error).removeprefix('invalid dsn: ').strip()}."


def _is_port(text: str) -> bool:
    return text.isdecimal() and 1 <= int(text) <= 65_535


_URI = re.compile(r"[\w+.-]+://")
# In a malformed string it is unclear where the password ends: rather too much is masked than too little.
_URI_PASSWORDS = (
    re.compile(r"^([^:]+://[^:@]*:).*(?=@)", re.DOTALL),
    re.compile(r"^([^:]+://[^:@/\[]*:)(?!\d+(?:[,/?]|\Z))[^@]*\Z", re.DOTALL),
    re.compile(r"([?&](?:ssl)?password=)[^&]*"),
)
_KEYWORD_PASSWORDS = (
    re.compile(r"((?:ssl)?password\s*=\s*)(?:'(?:\\.|[^'\\])*(?:'|\Z))?(?:(?!\s+\w+\s*=).)*", re.DOTALL),
    re.compile(r"^([^:@=]*:).*(?=@)", re.DOTALL),
)


def masked(url: str) -> str:
    """`url` with `***` for its passwords, also where it is malformed."""
    for password in _URI_PASSWORDS if _URI.match(url) else _KEYWORD_PASSWORDS:
        url = password.sub(r"\1***", url)
    return url


def _libpq_parameters(variables: Mapping[str, str]) -> dict[str, str]:
    return {LIBPQ_VARIABLES[name]: value for name, value in variables.items() if value}


def _multi_host(parameters: Mapping[str, str]) -> dict[str, str]:
    # Of several hosts, a standby may be the first to answer: it would refuse every row.
    several = "," in parameters.get("host", "") or "," in parameters.get("hostaddr", "")
    return {"target_session_attrs": "read-write"} if several else {}
