"""The command line: `mqtt-bridge COMMAND`.

Every command reads the same settings, from the environment and `.env`. Exit codes: 0 well ended, 2 configuration
error, 3 another process took over the client id, 1 anything else.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import closing, contextmanager
from typing import IO, Any

import click
import orjson
import psycopg2

from mqtt_bridge import __version__, logs, schema
from mqtt_bridge.bridge import EXIT_FAILED, EXIT_FENCED, EXIT_OK, EXIT_SETTINGS, Bridge, make_router
from mqtt_bridge.broker_connection import prepare_client
from mqtt_bridge.commands import Commands
from mqtt_bridge.connections import BridgeConnection
from mqtt_bridge.errors import BridgeError, Fenced, SettingsError, classify
from mqtt_bridge.former_members import FormerMembers
from mqtt_bridge.last_resort import OwnProcess
from mqtt_bridge.leash import Answer, Leash
from mqtt_bridge.membership import settings_of
from mqtt_bridge.settings import Settings, inheritance, load, unknown_names, with_client_id
from mqtt_bridge.supervisor import Supervisor
from mqtt_bridge.tools.dead_letter_commands import dead_letters

ENDING = (signal.SIGTERM, signal.SIGINT)
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main() -> None:
    """Entry point of the console script; turns the errors of the bridge into one clear message and an exit code."""
    code = EXIT_FAILED
    try:
        # Without its standalone mode click returns the code of an `Exit`, and the commands return None.
        code = group(prog_name="mqtt-bridge", standalone_mode=False) or EXIT_OK
    except click.Abort:
        click.echo("aborted", err=True)
    except click.ClickException as error:
        error.show()
        code = EXIT_SETTINGS if isinstance(error, click.UsageError) else EXIT_FAILED
    except SettingsError as error:
        _tell(error)
        code = EXIT_SETTINGS
    except Fenced as error:
        click.echo(f"mqtt-bridge: {error}", err=True)
        code = EXIT_FENCED
    except BridgeError as error:
        click.echo(f"mqtt-bridge: {error}", err=True)
    _leave(code)


def _tell(error: SettingsError) -> None:
    count = len(error.problems)
    click.echo(f"mqtt-bridge: {count} configuration {'problem' if count == 1 else 'problems'}:", err=True)
    for problem in error.problems:
        click.echo(f"  {problem}", err=True)


def _leave(code: int) -> None:
    """Exit with `code`, even when a thread still hangs in a system call: nothing that matters is left to be done."""
    sys.stdout.flush()
    sys.stderr.flush()
    hanging = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    if any(thread.name.startswith("mqtt-bridge-worker") for thread in hanging):
        os._exit(code)
    sys.exit(code)


@click.group(
    context_settings=CONTEXT,
    epilog="""\b
Examples:
  mqtt-bridge demo                      see it work: servers, devices and bridge, nothing to install
  mqtt-bridge check                     is everything as it should be?
  mqtt-bridge run                       run it
  mqtt-bridge explain devices/d1/telemetry '{"temperature": 21.5}'

Settings come from the environment and from .env; .env.example lists them all.""",
)
@click.version_option(__version__, prog_name="mqtt-bridge")
def group() -> None:
    """Move MQTT messages into PostgreSQL: nothing lost, nothing twice."""


@group.command(
    epilog="""\b
Examples:
  mqtt-bridge run
  MQTT_HOST=broker.example MQTT_TOPICS='sensors/{device}/#' DATABASE_URL=postgresql://bridge@db/iot mqtt-bridge run

SIGTERM and SIGINT end it in good order: drain, commit, acknowledge, leave. A second one ends it at once."""
)
@click.option("--abandon-spool", metavar="ID",
              help="Start although this spool is not at hand: what waits in it is given up.")  # fmt: skip
@click.option("--member-of", metavar="ID", hidden=True, help="The bridge that this is one process of.")
@click.option("--leash", type=int, hidden=True, help="The descriptor that ties it to its supervisor.")
def run(abandon_spool: str | None, member_of: str | None, leash: int | None) -> None:
    """Run the bridge until it is told to stop."""
    if member_of is not None and leash is not None:
        raise click.exceptions.Exit(_run_member(member_of, leash, abandon_spool))
    settings = _settings()
    for problem in unknown_names():
        click.echo(f"mqtt-bridge: warning: {problem}", err=True)
    run_it = _run_one if settings.bridge_processes == 1 else _run_several
    raise click.exceptions.Exit(run_it(settings, abandon_spool))


def _run_one(settings: Settings, abandon_spool: str | None) -> int:
    bridge = Bridge(
        settings, abandoned_spool=abandon_spool, member_of=settings.mqtt_client_id, last_resort=OwnProcess()
    )
    commands = Commands(settings, inheritance())
    former = FormerMembers(settings, commands.retire, ready=lambda: bridge.observe().ready)

    def request_stop() -> None:
        former.request_stop()
        bridge.request_stop()

    with _stopping(request_stop):
        former.start()
        try:
            return bridge.run()
        finally:
            former.stop()


def _run_several(settings: Settings, abandon_spool: str | None) -> int:
    supervisor = Supervisor(settings, inheritance(), abandoned_spool=abandon_spool)
    with _stopping(supervisor.request_stop, now=supervisor.stop_now):
        return supervisor.run()


def _run_member(member_of: str, leash: int, abandon_spool: str | None) -> int:
    """One of several processes. What is wrong with names of settings the supervisor has said."""
    settings = load()
    logs.configure(settings.log_level, settings.log_format, client_id=settings.mqtt_client_id)
    bridge = Bridge(settings, abandoned_spool=abandon_spool, member_of=member_of, last_resort=OwnProcess())
    with _stopping(bridge.request_stop):
        Leash(leash, stop=bridge.request_stop, answer=lambda: Answer(bridge.observe(), bridge.unhealthy())).start()
        return bridge.run()


def _settings() -> Settings:
    settings = load()
    logs.configure(settings.log_level, settings.log_format)
    return settings


@contextmanager
def _stopping(request_stop: Callable[[], None], *, now: Callable[[], None] = lambda: None) -> Any:
    """SIGTERM and SIGINT ask for an orderly end; the second one does not ask: after `now` the process is over.

    A thread hears of them by the descriptor that is written to at once. Handlers of Python run in the main thread, when
    it next comes back from C: a database that it waits for may take a minute.
    """
    heard, wakes = socket.socketpair()
    wakes.setblocking(False)

    def listen() -> None:
        asked = False
        with heard:
            while number := heard.recv(1):
                if number[0] in ENDING and asked:
                    now()
                    os._exit(EXIT_FAILED)
                if number[0] in ENDING:
                    asked = True
                    threading.Thread(target=request_stop, name="mqtt-bridge-stop", daemon=True).start()

    threading.Thread(target=listen, name="mqtt-bridge-signals", daemon=True).start()
    wakes_before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakes_before)
        wakes.close()


@group.command(
    epilog="""\b
Examples:
  mqtt-bridge demo
  mqtt-bridge demo --devices 1000 --interval 0.5 --duration 60"""
)
@click.option("--devices", default=200, show_default=True, type=click.IntRange(1, 100_000), help="Simulated devices.")
@click.option("--interval", default=1.0, show_default=True, type=click.FloatRange(0.001), metavar="S",
              help="Seconds between the messages of a device.")  # fmt: skip
@click.option("--duration", default=None, type=click.FloatRange(0.1), metavar="S",
              help="End after so many seconds; without it, Ctrl-C ends it.")  # fmt: skip
def demo(devices: int, interval: float, duration: float | None) -> None:
    """Start PostgreSQL, a broker, simulated devices and the bridge, and show what happens."""
    from mqtt_bridge.tools.demo import run_demo

    logs.configure("warning", "console")
    stop = threading.Event()
    with _stopping(stop.set):
        code = run_demo(devices=devices, interval_s=interval, duration_s=duration, stop=stop, echo=click.echo)
    raise click.exceptions.Exit(code)


@group.command(
    epilog="""\b
Examples:
  mqtt-bridge check
  mqtt-bridge check --offline     settings and routes only

Exit code 0 when the bridge can run (warnings may remain), 2 when it cannot."""
)
@click.option("--offline", is_flag=True, help="Look at settings and routes only, reach no server.")
def check(offline: bool) -> None:
    """Check settings, broker and database, and name what would bite in production."""
    from mqtt_bridge.tools import check as checking

    logs.configure("error", "console")
    try:
        settings = load()
        router = make_router(settings)
        findings = checking.check(settings, router.filters, unknown=unknown_names(), offline=offline)
        levels = [_show(finding) for finding in findings]
    except SettingsError as error:
        levels = [_show(finding) for finding in checking.failed(error)]
    problems = levels.count("problem")
    click.echo(f"\n{problems} problems, {levels.count('warning')} warnings")
    raise click.exceptions.Exit(EXIT_SETTINGS if problems else EXIT_OK)


def _show(finding: Any) -> str:
    colour = {"ok": "green", "warning": "yellow", "problem": "red"}[finding.level]
    click.secho(str(finding)[:8], fg=colour, nl=False)
    click.echo(finding.text)
    return str(finding.level)


@group.command(
    epilog="""\b
Examples:
  mqtt-bridge explain devices/d1/telemetry '{"temperature": 21.5, "ts": 1767225600}'
  mosquitto_sub -C 1 -t 'devices/+/telemetry' | mqtt-bridge explain devices/d1/telemetry -
  mqtt-bridge explain devices/d1/telemetry @message.bin --json
  mqtt-bridge explain --tape capture.jsonl --json"""
)
@click.argument("topic", required=False)
@click.argument("payload", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a message.")
@click.option("--tape", type=click.File("r", encoding="utf-8"), help="Explain every message of a tape (JSON Lines).")
def explain(topic: str | None, payload: str | None, as_json: bool, tape: IO[str] | None) -> None:
    """Show which route takes a message, and the exact rows that it would be stored as.

    PAYLOAD is text, `-` for standard input, or @FILE. Neither broker nor database is needed.
    """
    from mqtt_bridge.tools import explain as explaining

    if (topic is None) == (tape is None):
        raise click.UsageError("give either a TOPIC (and a PAYLOAD), or --tape FILE")
    router = make_router(load())
    show = _print_json if as_json else _print_explained
    if tape is not None:
        for explanation in explaining.explain_tape(router, tape):
            show(explanation)
    elif topic is not None:
        show(explaining.explain(router, topic, _payload(payload)))


def _payload(text: str | None) -> bytes:
    if text is None:
        return b""
    if text == "-":
        return sys.stdin.buffer.read()
    if text.startswith("@"):
        try:
            with open(text[1:], "rb") as file:
                return file.read()
        except OSError as error:
            raise click.UsageError(f"cannot read {text[1:]}: {error.strerror}") from error
    return os.fsencode(text)


def _print_json(content: Any) -> None:
    click.echo(orjson.dumps(content).decode())


def _print_explained(explanation: dict[str, Any]) -> None:
    from mqtt_bridge.tools.explain import render

    click.echo(render(explanation))


@group.command(
    name="schema",
    epilog="""\b
Examples:
  mqtt-bridge schema                     print the SQL
  mqtt-bridge schema | psql "$OWNER_URL" have an owner apply it
  mqtt-bridge schema --apply             apply it as the user in DATABASE_URL""",
)
@click.option("--apply", "apply_it", is_flag=True, help="Create what is missing, instead of printing.")
def schema_command(apply_it: bool) -> None:
    """Print, or apply, the SQL for the tables that the bridge needs."""
    settings = _settings()
    if not apply_it:
        click.echo(schema.ddl(), nl=False)
        return
    connection: BridgeConnection | None = None
    try:
        connection = psycopg2.connect(settings.dsn(), connection_factory=BridgeConnection)
        absent = schema.missing(connection)
        schema.apply(connection)
        click.echo("\n".join(f"created: {item.split()[1]}" for item in absent) or "nothing was missing")
    except psycopg2.Error as error:
        failure = classify(error, connected=connection is not None and not connection.closed)
        raise BridgeError(f"the schema was not applied: {failure}") from error
    finally:
        if connection is not None:
            connection.close()


@group.command(
    epilog="""\b
Examples:
  mqtt-bridge simulate --devices 200 --interval 1
  mqtt-bridge simulate --devices 50 --count 10000 --interval 0.01
  mqtt-bridge simulate --garbage 0.01 --duplicates 0.01 --late 0.05 --duration 60"""
)
@click.option("--devices", default=10, show_default=True, type=click.IntRange(1, 100_000), help="Simulated devices.")
@click.option("--interval", default=1.0, show_default=True, type=click.FloatRange(0.0001), metavar="S",
              help="Seconds between the messages of a device.")  # fmt: skip
@click.option("--count", type=click.IntRange(1), help="End after so many messages in total.")
@click.option("--duration", type=click.FloatRange(0.1), metavar="S", help="End after so many seconds.")
@click.option("--topic", default="devices/{device}/telemetry", show_default=True, help="Where each device publishes.")
@click.option("--qos", default=1, show_default=True, type=click.IntRange(0, 1), help="Quality of service.")
@click.option("--connections", default=4, show_default=True, type=click.IntRange(1, 1000), help="MQTT connections.")
@click.option("--seed", default=0, show_default=True, help="Equal seeds make equal readings.")
@click.option("--duplicates", default=0.0, type=click.FloatRange(0, 1), help="Share of messages published twice.")
@click.option("--garbage", default=0.0, type=click.FloatRange(0, 1), help="Share of messages that are broken.")
@click.option("--late", default=0.0, type=click.FloatRange(0, 1), help="Share of messages with an old time.")
@click.option("--bursts", default=0.0, type=click.FloatRange(0, 1), help="Share of messages that come in bursts.")
def simulate(duration: float | None, count: int | None, interval: float, **options: Any) -> None:
    """Publish the readings of simulated devices to the broker of the settings."""
    from mqtt_bridge.tools.simulator import Simulator, render

    settings = _settings()
    simulator = Simulator(
        settings.mqtt_host,
        settings.mqtt_port,
        interval_s=interval,
        count=count,
        duration_s=duration,
        protocol=settings.mqtt_protocol,
        transport=settings.mqtt_transport,
        prepare=lambda client: prepare_client(client, settings),
        **options,
    )
    stop = threading.Event()
    with _stopping(stop.set), _progress_bar(count, duration) as progress:
        summary = simulator.run(stop, progress)
    click.echo(render(summary))


@contextmanager
def _progress_bar(count: int | None, duration: float | None) -> Any:
    """A bar where the end is known, else a running count."""
    length = count or (round(duration * 10) if duration else None)
    if length is None:
        yield lambda progress: click.echo(f"\rpublished {progress.published}", nl=False, err=True)
        click.echo(err=True)
        return
    with click.progressbar(length=length, label="publishing", file=sys.stderr) as bar:

        def update(progress: Any) -> None:
            done = progress.published if count else round(progress.seconds * 10)
            bar.update(min(done, length) - bar.pos)

        yield update


group.add_command(dead_letters)


@group.command(
    epilog="""\b
Examples:
  mqtt-bridge retire mqtt-bridge-3
  mqtt-bridge retire old-name --yes --quiet 10
  MQTT_TOPICS='sensors/{device}/#' mqtt-bridge retire old-name

\b
Give it the settings that the bridge ran with: they say where broker and database are, how messages
are stored, and (with what the database noted) what to unsubscribe from.

\b
* A bridge that runs under the client id is stopped, with exit code 3. Whatever restarts it would
  take the client id back, and end this command with exit code 3: stop that first.
* What is published after the UNSUBSCRIBE is not for this session any more. In a shared group the
  others get it. Without one, start the bridge with the new name first: both store what comes
  meanwhile, so let the overlap be short.
* Where the broker makes the user name the client id (Mosquitto's use_username_as_clientid),
  MQTT_USERNAME has to be CLIENT_ID; with another user it refuses.
* A broker may throw away what is queued for a client when it unsubscribes (MQTT allows that);
  Mosquitto keeps it.
* Interrupted or killed, it has lost nothing and stored nothing twice: run it again.

\b
Exit codes: 0 retired, or nothing to retire; 2 settings; 3 a bridge took the client id back; 1 other."""
)
@click.argument("client_id")
@click.option("--quiet", default=5.0, show_default=True, type=click.FloatRange(0.5, 3600), metavar="S",
              help="Believe that a session is empty when nothing has come for so long.")  # fmt: skip
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--leash", type=int, hidden=True, help="The descriptor that ties it to who has started it.")
def retire(client_id: str, quiet: float, yes: bool, leash: int | None) -> None:
    """End a client id for good: store what its session holds, then end the session.

    For scaling down and for renaming: a session that nobody uses any more goes on collecting messages at the broker.
    """
    from mqtt_bridge.tools import retire as retiring

    if not yes and not sys.stdin.isatty():
        raise click.UsageError("nobody is there to be asked: give --yes")
    configured = load()
    settings = with_client_id(configured, client_id)
    if configured.bridge_processes > 1:  # one of its processes, most likely: in its group, with its disk
        settings = settings_of(configured, client_id)
    logs.configure("error" if settings.log_level == "error" else "warning", settings.log_format)
    line = retiring.ProgressLine(sys.stderr)
    with line, closing(retiring.Retirement(settings, quiet_s=quiet, show=line.show, say=line.say)) as retirement:
        if leash is not None:
            Leash(leash, stop=retirement.request_stop).start()
        with _stopping(retirement.request_stop):
            known = retirement.look_up()
        line.clear()
        if not yes:
            click.confirm(retiring.question(settings, known), abort=True, err=True)
        with _stopping(retirement.request_stop):
            summary = retirement.run(known)
    click.echo(retiring.render(client_id, summary))


@group.command(
    epilog="""\b
Examples:
  mqtt-bridge status
  mqtt-bridge status --json | jq .messages"""
)
@click.option("--json", "as_json", is_flag=True, help="Print the answer of /api/status as it is.")
def status(as_json: bool) -> None:
    """Show the state of a running bridge, asked over HTTP at HTTP_HOST and HTTP_PORT."""
    from mqtt_bridge.tools import status as asking

    settings = load()
    token = settings.http_token.get_secret_value() if settings.http_token else None
    content = asking.fetch(settings.http_host, settings.http_port, token=token)
    if as_json:
        _print_json(content)
    else:
        click.echo(asking.render(content))
