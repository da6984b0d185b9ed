"""Settings: where they come from, what is refused and with which remedy, and what stays secret."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import parse_dsn
from pydantic import ValidationError

from mqtt_bridge.errors import SettingsError
from mqtt_bridge.settings import NAMES, Settings, describe, inheritance, load, unknown_names

EXAMPLE = Path(__file__).parents[2] / ".env.example"


def problems_of(environ, env_file=None):
    with pytest.raises(SettingsError) as refused:
        load(environ, env_file)
    return refused.value.problems


def problem_of(**environ):
    [problem] = problems_of(environ)
    return problem


@pytest.fixture
def env_file(tmp_path):
    def write(text):
        path = tmp_path / ".env"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def pem(tmp_path):
    path = tmp_path / "file.pem"
    path.write_text("PEM")
    return str(path)


# --- Where values come from


def test_nothing_given_is_a_complete_configuration():
    settings = load({}, None)

    assert settings == Settings()
    assert (settings.mqtt_host, settings.mqtt_port, settings.mqtt_client_id) == ("localhost", 1883, "mqtt-bridge")
    assert settings.mqtt_topics == ("devices/{device}/telemetry",)
    assert settings.dsn()


def test_the_environment_wins_over_the_env_file(env_file):
    path = env_file("MQTT_HOST=from-file\nMQTT_PORT=1999\n")

    settings = load({"MQTT_HOST": "from-environment"}, path)

    assert (settings.mqtt_host, settings.mqtt_port) == ("from-environment", 1999)


def test_without_arguments_the_process_environment_and_its_env_file_are_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MQTT_HOST", "from-environment")
    (tmp_path / ".env").write_text("HTTP_PORT=0\n")

    settings = load()

    assert (settings.mqtt_host, settings.http_port) == ("from-environment", 0)


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_value_means_the_default(empty):
    settings = load({"MQTT_USERNAME": empty, "DB_POOL_SIZE": empty, "MQTT_TLS_CA": empty, "DATABASE_URL": empty}, None)

    assert settings == Settings()


def test_an_empty_value_in_the_environment_undoes_the_env_file(env_file):
    path = env_file("MQTT_USERNAME=alice\n")

    assert load({"MQTT_USERNAME": ""}, path).mqtt_username is None


def test_an_env_file_may_have_comments_quotes_and_a_byte_order_mark(env_file):
    path = env_file("\ufeffMQTT_HOST=broker # here\nexport MQTT_WS_PATH='/a b'\nLOG_LEVEL\n")

    settings = load({}, path)

    assert (settings.mqtt_host, settings.mqtt_ws_path, settings.log_level) == ("broker", "/a b", "info")


def test_a_broken_line_of_the_env_file_is_a_problem_that_does_not_show_the_line(env_file):
    path = env_file("MQTT_HOST=broker\nMQTT_PASSWORD='hunter2\n")

    [problem] = problems_of({}, path)

    assert problem.setting == f"{path} line 2"
    assert "hunter2" not in str(problem)


def test_an_env_file_that_is_not_there_is_no_problem(tmp_path):
    assert load({}, tmp_path / ".env") == Settings()


def test_an_env_file_that_cannot_be_read_is_a_problem(tmp_path):
    [problem] = problems_of({}, tmp_path)

    assert problem.setting == str(tmp_path)
    assert "directory" in problem.problem


def test_topics_are_separated_by_commas():
    settings = load({"MQTT_TOPICS": "a/{device}/b, c/+/d,#"}, None)

    assert settings.mqtt_topics == ("a/{device}/b", "c/+/d", "#")


def test_choices_may_be_written_in_capitals():
    assert load({"LOG_LEVEL": "INFO", "MQTT_TRANSPORT": "WebSockets"}, None).log_level == "info"


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        Settings().mqtt_host = "other"


# --- Defaults that depend on other settings


@pytest.mark.parametrize(("tls", "port"), [("false", 1883), ("true", 8883)])
def test_the_port_is_that_of_plain_or_of_secure_mqtt(tls, port):
    assert load({"MQTT_TLS": tls}, None).mqtt_port == port
    assert load({"MQTT_TLS": tls, "MQTT_PORT": "1234"}, None).mqtt_port == 1234


def test_the_pool_has_two_connections_more_than_there_are_workers():
    assert load({"BRIDGE_WORKERS": "7"}, None).db_pool_size == 9
    assert load({"BRIDGE_WORKERS": "7", "DB_POOL_SIZE": "3"}, None).db_pool_size == 3


def test_the_receive_maximum_is_half_of_the_queue():
    assert load({"BRIDGE_QUEUE_SIZE": "500"}, None).mqtt_receive_maximum == 250
    assert load({"BRIDGE_QUEUE_SIZE": "500", "MQTT_RECEIVE_MAXIMUM": "30000"}, None).mqtt_receive_maximum == 30_000


# --- What is refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MQTT_PORT", "0"),
        ("MQTT_PORT", "65536"),
        ("MQTT_PORT", "abc"),
        ("MQTT_KEEPALIVE_S", "4"),
        ("MQTT_KEEPALIVE_S", "65536"),
        ("MQTT_KEEPALIVE_S", "1.5"),
        ("MQTT_RECEIVE_MAXIMUM", "0"),
        ("MQTT_RECEIVE_MAXIMUM", "65536"),
        ("MQTT_SESSION_EXPIRY_S", "-1"),
        ("MQTT_QOS", "3"),
        ("MQTT_QOS", "-1"),
        ("MQTT_PROTOCOL", "3.1"),
        ("MQTT_TRANSPORT", "udp"),
        ("MQTT_TLS", "maybe"),
        ("MQTT_RETAINED", "sometimes"),
        ("MQTT_REDELIVERY", "twice"),
        ("DB_POOL_SIZE", "0"),
        ("DB_STATEMENT_TIMEOUT_S", "0"),
        ("BRIDGE_WORKERS", "0"),
        ("BRIDGE_BATCH_SIZE", "0"),
        ("BRIDGE_BATCH_WAIT_MS", "-1"),
        ("BRIDGE_QUEUE_SIZE", "99"),
        ("BRIDGE_QUEUE_SIZE", "30001"),
        ("BRIDGE_QUEUE_MB", "0"),
        ("BRIDGE_MAX_VALUES", "0"),
        ("BRIDGE_MAX_DEPTH", "0"),
        ("BRIDGE_DEAD_LETTER_DAYS", "-1"),
        ("BRIDGE_SHUTDOWN_S", "0"),
        ("BRIDGE_SPOOL_MAX_MB", "0"),
        ("HTTP_PORT", "65536"),
        ("HTTP_PORT", "-1"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
        ("MQTT_HOST", "mqtt://broker"),
        ("MQTT_HOST", "broker:1883"),
        ("MQTT_HOST", "[::1]"),
        ("MQTT_WS_PATH", "mqtt"),
        ("MQTT_CLIENT_ID", "a\tb"),
        ("MQTT_SHARED_GROUP", "a/b"),
        ("MQTT_SHARED_GROUP", "a+"),
        ("MQTT_SHARED_GROUP", "#"),
        ("MQTT_TOPICS", "a/#/b"),
        ("MQTT_TOPICS", "{x...}/{y...}"),
    ],
)
def test_a_wrong_value_is_one_problem_with_setting_value_fault_and_remedy(name, value):
    problem = problem_of(**{name: value})

    assert (problem.setting, problem.value) == (name, value)
    assert problem.problem.endswith(".")
    assert re.fullmatch(r"(Set|Write|Begin) .+\.", problem.remedy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MQTT_PORT", "65535"),
        ("MQTT_HOST", "::1"),
        ("MQTT_KEEPALIVE_S", "5"),
        ("MQTT_SESSION_EXPIRY_S", "4294967295"),
        ("MQTT_QOS", "0"),
        ("MQTT_TOPICS", "/a//b/"),
        ("MQTT_SHARED_GROUP", "group 1"),
        ("BRIDGE_QUEUE_SIZE", "100"),
        ("BRIDGE_QUEUE_SIZE", "30000"),
        ("BRIDGE_DEAD_LETTER_DAYS", "0"),
        ("HTTP_PORT", "0"),
    ],
)
def test_a_value_at_the_edge_is_accepted(name, value):
    assert load({name: value}, None)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("MQTT_PORT", "x", "Set a whole number from 1 to 65535."),
        ("BRIDGE_SPOOL_MAX_MB", "0", "Set a whole number of 1 or more."),
        ("MQTT_TLS", "x", "Set true or false."),
        ("MQTT_PROTOCOL", "4", "Set one of 5, 3.1.1."),
        ("LOG_LEVEL", "x", "Set one of debug, info, warning, error."),
    ],
)
def test_the_remedy_names_what_is_possible(name, value, remedy):
    assert problem_of(**{name: value}).remedy == remedy


def test_every_problem_is_reported_at_once():
    environ = {
        "MQTT_PORT": "abc",
        "MQTT_QOS": "2",
        "MQTT_TOPICS": "a/#/b,ok/{device},{x}/{x}",
        "BRIDGE_WORKERS": "none",
        "DATABASE_URL": "nonsense",
        "HTTP_TOKEN_FILE": "/nowhere",
    }

    problems = problems_of(environ)

    assert sorted(problem.setting for problem in problems) == [
        "BRIDGE_WORKERS",
        "DATABASE_URL",
        "HTTP_TOKEN_FILE",
        "MQTT_PORT",
        "MQTT_QOS",
        "MQTT_TOPICS",
        "MQTT_TOPICS",
    ]


def test_a_problem_does_not_bring_others_that_only_follow_from_it(pem):
    [problem] = problems_of({"MQTT_TLS": "maybe", "MQTT_TLS_CA": pem})

    assert problem.setting == "MQTT_TLS"


def test_qos_2_is_refused_with_the_reason():
    problem = problem_of(MQTT_QOS="2")

    assert "memory only" in problem.problem
    assert "publishers with QoS 2" in problem.remedy


def test_a_session_that_ends_at_once_is_refused_with_the_reason():
    assert "forget the session" in problem_of(MQTT_SESSION_EXPIRY_S="0").problem


def test_an_empty_client_id_is_refused_as_it_may_be_a_variable_that_expanded_to_nothing():
    assert problem_of(MQTT_CLIENT_ID="").setting == "MQTT_CLIENT_ID"


def test_a_shared_subscription_needs_mqtt_5():
    problem = problem_of(MQTT_SHARED_GROUP="group", MQTT_PROTOCOL="3.1.1")

    assert "need MQTT 5" in problem.problem


def test_several_processes_need_mqtt_5():
    assert load({"BRIDGE_PROCESSES": "4"}, None).bridge_processes == 4

    problem = problem_of(BRIDGE_PROCESSES="4", MQTT_PROTOCOL="3.1.1")

    assert (problem.setting, problem.value) == ("BRIDGE_PROCESSES", "4")
    assert "MQTT_PROTOCOL=5" in problem.remedy


@pytest.mark.parametrize("client_id", ["hall/7", "a+b", "#"])
def test_the_client_id_of_several_processes_has_to_be_fit_for_a_group_unless_there_is_one(client_id):
    assert "MQTT_SHARED_GROUP" in problem_of(BRIDGE_PROCESSES="2", MQTT_CLIENT_ID=client_id).remedy

    load({"BRIDGE_PROCESSES": "2", "MQTT_CLIENT_ID": client_id, "MQTT_SHARED_GROUP": "hall"}, None)
    load({"MQTT_CLIENT_ID": client_id}, None)


# --- For a subprocess


def test_a_subprocess_has_the_same_settings_whatever_becomes_of_the_env_file(env_file):
    path = env_file("MQTT_HOST=broker\nMQTT_PASSWORD_FILE=/run/secret\nPGHOST=db\nPGPORT=\nOTHER=1\n")
    environ = {"MQTT_PORT": "1999", "PATH": "/bin", "MQTT_CLIENT_ID": "hall"}

    inherited = inheritance(environ, path)

    later = env_file("MQTT_HOST=another\nMQTT_USERNAME=alice\nDATABASE_URL=postgresql://elsewhere/\n")
    path_of_secret = later.with_name("secret")
    path_of_secret.write_text("hunter2")
    settings = load(inherited | {"MQTT_PASSWORD_FILE": str(path_of_secret)}, later)
    assert (settings.mqtt_host, settings.mqtt_port, settings.mqtt_client_id) == ("broker", 1999, "hall")
    assert settings.mqtt_credentials() == (None, "hunter2")
    assert settings.database_url is None
    assert (inherited["PGHOST"], inherited["PATH"], inherited["MQTT_PASSWORD_FILE"]) == ("db", "/bin", "/run/secret")
    assert "PGPORT" not in inherited
    assert "OTHER" not in inherited


def test_mqtt_3_allows_no_password_without_a_user_name():
    assert problem_of(MQTT_PASSWORD="x", MQTT_PROTOCOL="3.1.1").setting == "MQTT_PASSWORD"


def test_routes_and_topics_together_are_refused():
    problems = problems_of({"BRIDGE_ROUTES": "routes.toml", "MQTT_TOPICS": "a"})

    assert any("MQTT_TOPICS is set as well" in problem.problem for problem in problems)


@pytest.mark.parametrize(("name", "value"), [("BRIDGE_ROUTES", "preset:shelly")])
def test_what_does_not_exist_yet_is_one_clear_problem(name, value):
    problem = problem_of(**{name: value})

    assert (problem.setting, problem.value) == (name, value)
    assert "not available in this version" in problem.problem


def test_a_port_that_kubernetes_made_up_says_how_to_stop_it():
    assert "enableServiceLinks" in problem_of(MQTT_PORT="tcp://10.0.0.1:1883").remedy


def test_a_long_value_is_shown_shortened():
    assert len(problem_of(MQTT_TOPICS="ä" * 40_000).value) < 300


# --- TLS


def test_tls_files_that_can_be_read_are_accepted(pem):
    settings = load({"MQTT_TLS": "true", "MQTT_TLS_CA": pem, "MQTT_TLS_CERT": pem, "MQTT_TLS_KEY": pem}, None)

    assert settings.mqtt_tls_ca == Path(pem)


@pytest.mark.parametrize("missing", ["/nowhere/ca.pem", "/"])
def test_a_tls_file_that_cannot_be_read_is_a_problem(missing):
    problem = problem_of(MQTT_TLS="true", MQTT_TLS_CA=missing)

    assert (problem.setting, problem.value) == ("MQTT_TLS_CA", missing)


def test_a_tls_file_without_tls_is_a_problem(pem):
    assert "MQTT_TLS=true" in problem_of(MQTT_TLS_CA=pem).remedy


@pytest.mark.parametrize(("name", "other"), [("MQTT_TLS_CERT", "MQTT_TLS_KEY"), ("MQTT_TLS_KEY", "MQTT_TLS_CERT")])
def test_a_certificate_and_its_key_need_each_other(pem, name, other):
    problem = problem_of(**{"MQTT_TLS": "true", name: pem})

    assert problem.setting == name
    assert other in problem.remedy


# --- Secrets


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_text("hunter2\n")
    return path


@pytest.mark.parametrize("name", ["MQTT_USERNAME", "MQTT_PASSWORD", "HTTP_TOKEN"])
def test_a_secret_may_come_from_a_file_whose_last_newline_does_not_count(secret, name):
    settings = load({f"{name}_FILE": str(secret)}, None)

    value = getattr(settings, name.lower())

    assert (value if isinstance(value, str) else value.get_secret_value()) == "hunter2"


def test_credentials_in_files_are_read_again_each_time(secret):
    settings = load({"MQTT_USERNAME": "bridge", "MQTT_PASSWORD_FILE": str(secret)}, None)
    assert settings.mqtt_credentials() == ("bridge", "hunter2")

    secret.write_text("rotated\r\n")

    assert settings.mqtt_credentials() == ("bridge", "rotated")


def test_without_credentials_there_are_none():
    assert load({}, None).mqtt_credentials() == (None, None)


def test_a_database_url_in_a_file_is_read_again_each_time(tmp_path):
    path = tmp_path / "url"
    path.write_text("postgresql://u:old@h/db\n")
    settings = load({"DATABASE_URL_FILE": str(path)}, None)
    assert parse_dsn(settings.dsn())["password"] == "old"

    path.write_text("postgresql://u:new@h/db\n")
    assert parse_dsn(settings.dsn())["password"] == "new"

    path.write_text("postgresql://u:new@h:x/db\n")
    with pytest.raises(SettingsError, match="port"):
        settings.dsn()


def test_a_secret_file_that_has_become_unreadable_is_a_problem(secret):
    settings = load({"MQTT_PASSWORD_FILE": str(secret)}, None)

    secret.unlink()

    with pytest.raises(SettingsError, match="MQTT_PASSWORD_FILE"):
        settings.mqtt_credentials()


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff", b"a\0b"])
def test_a_secret_file_without_a_usable_content_is_a_problem(secret, content):
    secret.write_bytes(content)

    problem = problem_of(MQTT_PASSWORD_FILE=str(secret))

    assert (problem.setting, problem.value) == ("MQTT_PASSWORD_FILE", str(secret))


@pytest.mark.parametrize("name", ["MQTT_USERNAME", "MQTT_PASSWORD", "DATABASE_URL", "HTTP_TOKEN"])
def test_a_secret_both_given_and_in_a_file_is_a_problem(secret, name):
    problems = problems_of({name: "hunter2", f"{name}_FILE": str(secret)})

    assert problems[0].setting == f"{name}_FILE"
    assert f"{name} is set as well" in problems[0].problem


def test_no_listing_shows_a_secret():
    environ = {"MQTT_PASSWORD": "hunter2", "HTTP_TOKEN": "hunter3", "DATABASE_URL": "postgresql://u:hunter4@h/db"}
    settings = load(environ, None)

    shown = repr(settings) + str(settings) + repr(describe(settings))

    assert "hunter" not in shown
    assert "postgresql://u:***@h/db" in shown


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter2%zz@h/db",
        "postgresql://u:hunter2/x@h/db",
        "postgresql://u:hun@ter2@h:x/db",
        "postgresql://u:hunter2@[::1/db",
        "postgresql://u:hunter2",
        'postgresql://u:hun"ter2%zz@h',
        "postgresql://h/db?password=hunter2&nonsense=1",
        "postgresql+psycopg2://u:hunter2@h/db",
        "u:hunter2@h/db",
        "password=hunter2 nonsense=1",
        "password=my hunter2 host=x",
        "password = 'my hunter2",
        r"password='my\' hunter2' nonsense=1",
        "password=***hunter2 nonsense=1",
        "password=a&hunter2 nonsense=1",
        "password=x:hun@hunter2 nonsense=1",
    ],
)
def test_a_malformed_database_url_is_shown_without_its_password(url):
    problem = problem_of(DATABASE_URL=url)

    assert problem.setting == "DATABASE_URL"
    assert "***" in problem.value
    assert "hun" not in str(problem)
    assert "ter2" not in str(problem)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("nonsense", 'missing "="'),
        ("postgresql://h/db?nonsense=1", 'invalid URI query parameter: "nonsense"'),
        ("postgresql://h:x/db", "port"),
        ("postgresql://a:1,b:65536/db", "port"),
        ("postgresql://u:1/x@h/db", "not percent-encoded"),
        ("host=a\udcff", "not a connection string"),
    ],
)
def test_a_malformed_database_url_is_refused_with_what_libpq_says(url, complaint):
    assert complaint in problem_of(DATABASE_URL=url).problem


_PASSWORDS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), min_size=4)


@given(_PASSWORDS)
def test_whatever_the_password_is_its_connection_string_is_shown_without_it(password):
    for template, written in (
        ("host=h password={} dbname=d", _quoted),
        ("postgresql://u:{}@h/d?sslmode=require", _percent_encoded),
    ):
        url = template.format(written(password))
        shown = describe_values(load({"DATABASE_URL": url}, None))["DATABASE_URL"]

        assert parse_dsn(url)["password"] == password
        assert shown == template.format("***")


def _percent_encoded(text):
    return quote(text, safe="")


def _quoted(text):
    return "'" + text.replace("\\", r"\\").replace("'", r"\'") + "'"


# --- The connection string


def dsn_of(environ, env_file=None):
    return parse_dsn(load(environ, env_file).dsn())


def test_the_connection_string_notices_a_dead_server_soon():
    assert dsn_of({"DATABASE_URL": "postgresql://u@h/db"}) == {
        "user": "u",
        "host": "h",
        "dbname": "db",
        "connect_timeout": "5",
        "keepalives_idle": "10",
        "keepalives_interval": "5",
        "keepalives_count": "3",
        "tcp_user_timeout": "15000",
        "application_name": "mqtt-bridge",
        "client_encoding": "UTF8",
    }


def test_what_the_database_url_says_wins_over_the_defaults():
    dsn = dsn_of({"DATABASE_URL": "postgresql://h/db?connect_timeout=9&application_name=mine&tcp_user_timeout=0"})

    assert (dsn["connect_timeout"], dsn["application_name"], dsn["tcp_user_timeout"]) == ("9", "mine", "0")


def test_what_libpq_reads_from_the_environment_is_left_to_it():
    dsn = dsn_of({"PGHOST": "h", "PGUSER": "u", "PGAPPNAME": "mine", "PGCONNECT_TIMEOUT": "9"})

    assert {"host", "user", "application_name", "connect_timeout"}.isdisjoint(dsn)
    assert dsn["keepalives_idle"] == "10"


def test_an_empty_libpq_variable_does_not_hide_a_default():
    assert dsn_of({"PGAPPNAME": "", "PGCONNECT_TIMEOUT": ""})["connect_timeout"] == "5"


def test_libpq_variables_of_the_env_file_are_passed_on(env_file):
    path = env_file("PGHOST=h\nPGDATABASE=d\nPGUSER=u\nPGPASSWORD=p w\nPGSSLMODE=require\nPGAPPNAME=mine\nPGPORT=\n")

    dsn = dsn_of({}, path)

    given = {name: dsn.get(name) for name in ("host", "dbname", "user", "password", "sslmode", "application_name")}
    assert given == {
        "host": "h",
        "dbname": "d",
        "user": "u",
        "password": "p w",
        "sslmode": "require",
        "application_name": "mine",
    }
    assert "port" not in dsn


def test_a_libpq_variable_of_the_environment_wins_over_the_env_file(env_file):
    path = env_file("PGHOST=from-file\nPGUSER=u\n")

    dsn = dsn_of({"PGHOST": "from-environment"}, path)

    assert "host" not in dsn
    assert dsn["user"] == "u"


def test_the_database_url_wins_over_libpq_variables_of_the_env_file(env_file):
    path = env_file("PGHOST=from-file\nPGPASSWORD=p\nDATABASE_URL=postgresql://u@h/db\n")

    dsn = dsn_of({}, path)

    assert (dsn["host"], dsn["password"]) == ("h", "p")


@pytest.mark.parametrize(
    "environ",
    [
        {"DATABASE_URL": "postgresql://a:1,b:2/db"},
        {"DATABASE_URL": "hostaddr=10.0.0.1,10.0.0.2"},
        {"PGHOST": "a,b"},
    ],
)
def test_of_several_hosts_the_one_that_takes_writes_is_used(environ):
    assert dsn_of(environ)["target_session_attrs"] == "read-write"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"DATABASE_URL": "postgresql://a,b/db?target_session_attrs=primary"}, "primary"),
        ({"DATABASE_URL": "postgresql://a,b/db", "PGTARGETSESSIONATTRS": "any"}, None),
        ({"DATABASE_URL": "postgresql://a/db", "PGHOST": "a,b"}, None),
    ],
)
def test_a_choice_among_hosts_that_was_made_or_is_not_needed_is_left_alone(environ, expected):
    assert dsn_of(environ).get("target_session_attrs") == expected


# --- Names that are no settings


def test_a_mistyped_name_is_a_warning_with_a_suggestion_and_without_its_value(env_file):
    path = env_file("MQTT_PASWORD=hunter2\n")

    [warning] = unknown_names({}, path)

    assert warning.setting == "MQTT_PASWORD"
    assert warning.remedy == "Did you mean MQTT_PASSWORD?"
    assert "hunter2" not in str(warning)


@pytest.mark.parametrize("name", ["MQTT_FOO_BAR_BAZ", "DB_X", "BRIDGE_BATCHSIZE", "mqtt_host"])
def test_names_that_look_like_settings_are_suspects_in_the_environment(name):
    assert [warning.setting for warning in unknown_names({name: "x", "PATH": "/bin"}, None)] == [name]


def test_names_that_other_programs_use_are_suspects_in_the_env_file_only(env_file):
    names = ["HTTP_PROXY", "LOG_DIR", "PGTZ"]
    path = env_file("".join(f"{name}=x\n" for name in names))

    assert unknown_names(dict.fromkeys(names, "x"), None) == []
    assert [warning.setting for warning in unknown_names({}, path)] == names


def test_settings_and_libpq_variables_are_no_suspects(env_file):
    path = env_file("PGHOST=h\nPGPASSFILE=f\n" + "".join(f"{name}=\n" for name in NAMES))

    assert unknown_names(dict.fromkeys(NAMES, ""), path) == []


# --- Listings and documents


def test_a_listing_tells_value_default_and_meaning_of_every_setting():
    environ = {"MQTT_TLS": "true", "MQTT_PASSWORD": "hunter2", "MQTT_TOPICS": "a, b"}

    lines = {line.name: line for line in describe(load(environ, None))}

    assert tuple(lines) == NAMES
    assert all(line.description.endswith(".") for line in lines.values())
    assert (lines["MQTT_TLS"].value, lines["MQTT_TLS"].default, lines["MQTT_TLS"].given) == ("true", "false", True)
    assert (lines["MQTT_PORT"].value, lines["MQTT_PORT"].given) == ("8883", False)
    assert lines["MQTT_PORT"].default == "1883, with MQTT_TLS=true 8883"
    assert lines["MQTT_PASSWORD"].value == "***"
    assert lines["MQTT_TOPICS"].value == "a,b"
    assert lines["HTTP_TOKEN"].value == ""


def test_every_default_is_within_the_limits():
    values = describe_values(Settings())

    settings = load(values, None)

    assert describe_values(settings) == values


def test_the_example_names_every_setting_and_no_other():
    names = re.findall(r"^#?([A-Z_]+)=", EXAMPLE.read_text(), re.MULTILINE)

    assert sorted(names) == sorted(NAMES)


def test_the_example_is_the_defaults():
    assert describe_values(load({}, EXAMPLE)) == describe_values(Settings())


def test_what_the_example_has_commented_out_is_the_default_where_there_is_one():
    defaults = describe_values(Settings())

    shown = dict(re.findall(r"^#([A-Z_]+)=(.*)$", EXAMPLE.read_text(), re.MULTILINE))

    assert {name: value for name, value in shown.items() if defaults[name]} == {
        name: defaults[name] for name in shown if defaults[name]
    }
    assert "" not in shown.values()


def describe_values(settings):
    return {line.name: line.value for line in describe(settings)}


def test_topics_that_overlap_are_refused_with_the_filter_that_covers_them() -> None:
    environ = {"MQTT_TOPICS": "a/{device}/b,a/x/#"}

    with pytest.raises(SettingsError) as caught:
        load(environ, env_file=None)

    (problem,) = caught.value.problems
    assert problem.setting == "MQTT_TOPICS"
    assert "a/+/#" in problem.remedy


def test_topics_that_overlap_are_fine_once_a_wider_one_covers_them() -> None:
    environ = {"MQTT_TOPICS": "a/{device}/b,a/x/#,a/+/#"}

    settings = load(environ, env_file=None)

    assert settings.mqtt_topics == ("a/{device}/b", "a/x/#", "a/+/#")
