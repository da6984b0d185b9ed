"""Logs: one sentence for a person plus structured fields, on stderr, for people (console) or machines (json).

structlog and the standard library's logging (paho, waitress) go through the same renderer, so that a log has one form.
`configure` is called once, at start, before threads are; the loggers themselves may be used by any thread.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Literal, TextIO

import orjson
import structlog
from structlog.types import EventDict, Processor, WrappedLogger

LogFormat = Literal["console", "json"]

_FIRST = ("time", "level", "event")


def configure(level: str, format: LogFormat, *, client_id: str | None = None, stream: TextIO | None = None) -> None:
    """Send every log of `level` ("info") or worse to `stream` (stderr). Called again, it replaces what was set.

    With a `client_id` every line tells it: several processes write to one stream.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared(client_id),
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(format, colors=handler.stream.isatty()),
            ],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared(client_id),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _shared(client_id: str | None) -> list[Processor]:
    """What every event gets, wherever it comes from."""

    def tell_whose(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        event.setdefault("client_id", client_id)
        return event

    return [
        *([tell_whose] if client_id is not None else []),
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]


def _renderers(format: LogFormat, *, colors: bool) -> list[Processor]:
    if format == "json":
        return [structlog.processors.format_exc_info, _in_order, _as_json]
    console = structlog.dev.ConsoleRenderer(
        colors=colors,
        timestamp_key="time",
        pad_event_to=0,
        sort_keys=False,
        # The one that structlog would choose shows local variables, which may hold secrets.
        exception_formatter=structlog.dev.plain_traceback,
    )
    return [_in_order, _printable, console]


def _in_order(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return {name: event.pop(name) for name in _FIRST if name in event} | dict(event)


def _as_json(logger: WrappedLogger, method: str, event: EventDict) -> str:
    try:
        return orjson.dumps(event, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:
        # Huge integers and broken text: slower, but no reason to lose the line.
        return json.dumps(event, default=repr)


def _printable(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Fields may hold topics, which anybody may send: no control sequence of theirs reaches a terminal."""
    event.pop("logger", None)
    if "sql" in event:  # to be copied by a person: in lines of its own, as a stack is printed
        event["stack"] = event.pop("sql")
    return {name: value if name in _AS_IS else _escaped(value) for name, value in event.items()}


_AS_IS = ("event", "exc_info", "exception", "stack")


def _escaped(value: object) -> object:
    if isinstance(value, str) and not value.isprintable():
        return value.encode("unicode_escape").decode()
    return value
