"""`mqtt-bridge dead-letters ...`: options in, `dead_letters` and `dead_letter_office` at work, text out."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any, TypeVar

import click
import orjson
import psycopg2

from mqtt_bridge import logs
from mqtt_bridge.bridge import make_router
from mqtt_bridge.connections import BridgeConnection
from mqtt_bridge.dead_letters import Selection, bounded, get, newest
from mqtt_bridge.dead_letters import summary as summarise
from mqtt_bridge.errors import BridgeError, classify
from mqtt_bridge.settings import Settings, load
from mqtt_bridge.tools import dead_letter_rendering as rendering
from mqtt_bridge.tools.dead_letter_office import DeadLetterOffice, Report, purge
from mqtt_bridge.topics import TopicPattern

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group(
    name="dead-letters",
    epilog="""\b
Examples:
  mqtt-bridge dead-letters list --summary               what goes wrong, and how often
  mqtt-bridge dead-letters list --since 2h --topic 'devices/+/telemetry'
  mqtt-bridge dead-letters show 17                      one of them, and what would become of it now
  mqtt-bridge dead-letters requeue --stage store        mended: store them
  mqtt-bridge dead-letters purge --older-than 30d       not worth keeping: delete them""",
)
def dead_letters() -> None:
    """Look at messages that could not be stored, store them after all, or delete them."""


# -- options


_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def _age(_context: click.Context, _parameter: click.Parameter, text: str | None) -> timedelta | None:
    """`90s`, `15m`, `2h`, `3d`, `1w`."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,5})([smhdw])", text.strip())
    if not found:
        raise click.BadParameter(f"{text!r} is not an age: write 90s, 15m, 2h, 3d or 1w.")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _moment(context: click.Context, parameter: click.Parameter, text: str | None) -> datetime | None:
    """A time (RFC 3339; UTC where it has no zone), or an age before now."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    try:
        return datetime.now(UTC) - (_age(context, parameter, text) or timedelta())
    except (click.BadParameter, OverflowError) as error:
        raise click.BadParameter(
            f"{text!r} is no time: write 2026-07-25T12:00:00Z (RFC 3339), or an age as 90s, 15m, 2h, 3d, 1w."
        ) from error


def _topic_filter(_context: click.Context, _parameter: click.Parameter, text: str | None) -> str | None:
    if text is None:
        return None
    try:
        pattern = TopicPattern.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if not pattern.exact:  # its filter would select more than was asked for
        raise click.BadParameter(f"{text!r} is a pattern: in a topic filter, + is one level and # all that remain.")
    return pattern.filter


_ID = click.option("--id", "ids", type=click.IntRange(1), multiple=True, metavar="N",
                   help="This dead letter; may be given several times.")  # fmt: skip
_REQUEUED = click.option("--requeued/--not-requeued", default=None, help="Those that were requeued, or were not.")
_FILTERS = (
    click.option("--since", callback=_moment, metavar="TIME",
                 help="Received at this time or later: RFC 3339, or an age as 2h, 3d."),
    click.option("--until", callback=_moment, metavar="TIME", help="Received before this time."),
    click.option("--topic", "topic_filter", callback=_topic_filter, metavar="FILTER",
                 help="Topic, as an MQTT filter: + is one level, # all that remain."),
    click.option("--stage", type=click.Choice(["route", "decode", "store"]), help="Where it failed."),
    click.option("--error", metavar="TEXT", help="Part of the error, upper or lower case."),
    click.option("--route", metavar="NAME", help="Route that had taken it."),
)  # fmt: skip


def _filtered(command: Command) -> Command:
    for option in reversed(_FILTERS):
        command = option(command)
    return command


# -- list and show


@dead_letters.command(
    name="list",
    epilog="""\b
Examples:
  mqtt-bridge dead-letters list
  mqtt-bridge dead-letters list --summary --since 1d
  mqtt-bridge dead-letters list --topic 'devices/+/telemetry' --error 'not JSON' --limit 500
  mqtt-bridge dead-letters list --not-requeued --json | jq -r .topic | sort | uniq -c

A summary counts errors together that differ in numbers only, written #, or in details of the server.""",
)
@_filtered
@_REQUEUED
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1), metavar="N", help="At most so many.")
@click.option("--summary", is_flag=True, help="Count them by stage and error.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
def list_command(limit: int, summary: bool, as_json: bool, **conditions: Any) -> None:
    """List dead letters, newest first."""
    selection, now = Selection(**conditions), datetime.now(UTC)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    with _database(_settings()) as connection:
        if summary:
            groups = summarise(connection, selection, limit=limit)
            objects, lines = [g._asdict() for g in groups], rendering.summarised(groups, now=now, width=width)
        else:
            letters = newest(connection, selection, limit=limit)
            objects, lines = list(map(rendering.as_json, letters)), rendering.listed(letters, now=now, width=width)
    if as_json:
        _print_json(*objects)
    elif objects:
        click.echo("\n".join(lines))
        if len(objects) == limit:
            click.echo(f"the first {limit:,}; --limit shows more", err=True)
    else:
        click.echo("no dead letters" + ("" if selection.is_everything else " meet these conditions"))


@dead_letters.command(
    epilog="""\b
Examples:
  mqtt-bridge dead-letters show 17
  mqtt-bridge dead-letters show 17 --json
  mqtt-bridge dead-letters show 17 --payload message.bin
  mqtt-bridge dead-letters show 17 --payload - | xxd | less"""
)
@click.argument("letter_id", metavar="ID", type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the whole payload.")
@click.option("--payload", "target", type=click.File("wb", lazy=True), metavar="FILE",
              help="Write the payload, byte by byte, to FILE (- for standard output), and nothing else.")  # fmt: skip
def show(letter_id: int, as_json: bool, target: Any) -> None:
    """Show everything about one dead letter, and what today's routes would make of it."""
    settings = _settings()
    with _database(settings) as connection:
        letter = get(connection, letter_id)
    if letter is None:
        raise BridgeError(
            f"There is no dead letter {letter_id}: `mqtt-bridge dead-letters list` shows which there are."
        )
    if target is not None:
        target.write(letter.payload)
        return
    explanation = rendering.explained(letter, make_router(settings))
    if as_json:
        _print_json(rendering.as_json(letter) | {"explanation": explanation})
    else:
        click.echo("\n".join(rendering.shown(letter, explanation, now=datetime.now(UTC))))


# -- requeue and purge


@dead_letters.command(
    epilog="""\b
Examples:
  mqtt-bridge dead-letters requeue --dry-run            what would happen, asked of the server, then rolled back
  mqtt-bridge dead-letters requeue --stage store --since 3d
  mqtt-bridge dead-letters requeue --id 17 --id 18

Each letter is stored once, also when this is interrupted, killed, or run twice at the same time: run it again. What
fails again is left as it is. What today's routes ignore is marked as requeued."""
)
@_filtered
@_ID
@click.option("--limit", type=click.IntRange(1), default=sys.maxsize, metavar="N",
              help="At most so many, the oldest first.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Do it all, and roll it back.")
def requeue(limit: int, dry_run: bool, **conditions: Any) -> None:
    """Store dead letters by today's routes, each with its original arrival time, exactly once."""
    settings = _settings()
    router = make_router(settings)
    report = Report()
    with _database(settings, advice=lambda: "" if dry_run else _advice(report)) as connection, _interruptible() as stop:
        selection, count = bounded(connection, Selection(requeued=False, **conditions))
        _tell_of_absent(selection, count)
        total = min(count, limit)
        office = DeadLetterOffice(
            connection, router, statement_timeout_s=settings.db_statement_timeout_s, dry_run=dry_run
        )
        with _bar(total, "trying" if dry_run else "requeueing", _figures) as bar:
            for report in office.requeue(selection, limit=limit):
                bar.update(report.seen - bar.pos, report)
                if stop.is_set():
                    break
    click.echo("\n".join(rendering.requeued(report, total, dry_run=dry_run)))
    _leave_if(stop.is_set() and report.seen < total)


def _advice(report: Report) -> str:
    return (
        f"{report.stored:,} dead letters were stored before; the chunk in hand was rolled back, or its COMMIT was"
        " not answered. Run it again: none is stored twice."
    )


def _tell_of_absent(selection: Selection, count: int) -> None:
    absent = len(set(selection.ids)) - count
    if absent > 0:
        click.echo(f"{absent:,} of these ids are not there, were requeued already, or are filtered out", err=True)


def _figures(report: Report | None) -> str:
    return f"{report.stored:,} stored, {report.failing.total():,} failing" if report else ""


@dead_letters.command(
    name="purge",
    epilog="""\b
Examples:
  mqtt-bridge dead-letters purge --older-than 30d
  mqtt-bridge dead-letters purge --requeued --yes
  mqtt-bridge dead-letters purge --topic 'test/#' --stage route
  mqtt-bridge dead-letters purge --id 17

The bridge itself deletes what is older than BRIDGE_DEAD_LETTER_DAYS.""",
)
@_filtered
@_ID
@_REQUEUED
@click.option("--older-than", callback=_age, metavar="AGE", help="Received longer ago than this: 12h, 30d, 8w.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge_command(older_than: timedelta | None, yes: bool, **conditions: Any) -> None:
    """Delete dead letters for good. At least one condition has to be given."""
    selection = Selection(**conditions)
    if older_than is not None:
        before = datetime.now(UTC) - older_than
        selection = replace(selection, until=min(before, selection.until or before))
    if selection.is_everything:
        raise click.UsageError("this would delete every dead letter: give --older-than, --id, --requeued or a filter")
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("nobody is there to be asked: give --yes")
    deleted = 0
    with _database(_settings(), advice=lambda: f"{deleted:,} were deleted before.") as connection:
        selection, count = bounded(connection, selection)
        if count and not yes:
            _ask(connection, selection, count)
        with _interruptible() as stop, _bar(count, "deleting") as bar:
            for deleted in purge(connection, selection):
                bar.update(deleted - bar.pos)
                if stop.is_set():
                    break
    click.echo(f"deleted {deleted:,} of {count:,} dead letters")
    _leave_if(stop.is_set() and deleted < count)


def _ask(connection: BridgeConnection, selection: Selection, count: int) -> None:
    """Go on, or abort."""
    waiting = 0 if selection.requeued else bounded(connection, replace(selection, requeued=False))[1]
    rest = f", {waiting:,} of them never requeued" if waiting else ""
    click.confirm(f"Delete {count:,} dead letters for good{rest}?", abort=True, err=True)


# -- around them


def _settings() -> Settings:
    settings = load()
    logs.configure(settings.log_level, settings.log_format)
    return settings


@contextmanager
def _database(settings: Settings, *, advice: Callable[[], str] = lambda: "") -> Iterator[BridgeConnection]:
    """One connection; its errors become one sentence with the remedy, and `advice` on what was done by then."""
    try:
        connection = psycopg2.connect(settings.dsn(), connection_factory=BridgeConnection)
    except psycopg2.Error as error:
        raise BridgeError(str(classify(error, connected=False))) from error
    try:
        yield connection
    except psycopg2.Error as error:
        failure = classify(error, connected=not connection.closed)
        raise BridgeError(f"{failure} {advice()}".rstrip()) from error
    finally:
        connection.close()


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, to be looked at between chunks; the second one ends it at once."""
    stop = threading.Event()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt  # the chunk in hand is rolled back
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_if(interrupted: bool) -> None:
    if interrupted:
        click.echo("interrupted", err=True)
        raise click.exceptions.Exit(1)


def _bar(length: int, label: str, figures: Callable[[Any], str] | None = None) -> Any:
    """A progress bar on stderr; where that is no terminal, only its label."""
    return click.progressbar(length=length, label=label, item_show_func=figures, show_pos=True, file=sys.stderr)


def _print_json(*objects: Any) -> None:
    for content in objects:
        click.echo(orjson.dumps(content, option=orjson.OPT_UTC_Z))
