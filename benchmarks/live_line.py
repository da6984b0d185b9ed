"""One line that says what happens now; where nobody watches, a line a measurement."""

from __future__ import annotations

import shutil
import sys
import time

import click

EVERY_S = 0.2


class LiveLine:
    """Writes to standard error, so that what is printed on standard output can be kept."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._part = ""
        self._began_s = time.monotonic()
        self._shown_s = 0.0

    def part(self, name: str) -> None:
        """What follows belongs to this part."""
        self._part, self._began_s, self._shown_s = name, time.monotonic(), 0.0
        if not self._is_terminal:
            click.echo(f"{name} ...", err=True)

    def say(self, sentence: str) -> None:
        """Replace the line."""
        now_s = time.monotonic()
        if not self._is_terminal or now_s - self._shown_s < EVERY_S:
            return
        self._shown_s = now_s
        width = shutil.get_terminal_size().columns - 1
        text = f"{self._part} ({now_s - self._began_s:,.0f} s): {sentence}"
        click.echo(f"\r{text[:width]:<{width}}", nl=False, err=True)

    def done(self, sentence: str) -> None:
        """Leave a line that stays."""
        if self._is_terminal:
            click.echo("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", nl=False, err=True)
        click.echo(f"{self._part}: {sentence} ({time.monotonic() - self._began_s:,.0f} s)", err=True)
