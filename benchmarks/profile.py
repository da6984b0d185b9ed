"""Where the bridge's time goes: py-spy looks at it, a hundred times a second and more, under full load on the feed.

Two recordings of the same load, one after the other: a flame graph (`profile.svg`), and the stacks as text, of which
the summary is made (`profile.txt`): the functions in which most time is spent, by thread, without what waits. To py-spy
a thread that waits for the interpreter's lock, or has just been woken, is busy: `--gil` leaves that out.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks.contestant import Stage
from benchmarks.contestants.bridge import Bridge
from benchmarks.feed import Feed
from benchmarks.servers import Servers, scratch
from benchmarks.telemetry import FILTER, Load

RATE = 500
"""Samples a second: fast enough for functions of some microseconds, slow enough not to hold up what it looks at."""
PER_S = 120_000
"""Messages for each second of recording: more than the bridge can take, so that it never runs dry."""
WARM_UP_S = 1.0
TOP = 12
WAITS = 0.95
"""A thread with this share of its samples in one function waits there, whatever py-spy takes it for."""


class ProfileError(click.ClickException):
    """It could not be recorded; the message says why."""


def record(folder: Path, *, seconds: int, gil: bool, native: bool) -> str:
    """Write both files into the folder; the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    bridge = Bridge()
    options = [*(["--gil"] if gil else []), *(["--native"] if native else [])]
    load = Load(PER_S * (2 * seconds + 2))
    stacks = folder / "profile.stacks"
    with Servers() as servers, servers.database() as dsn, scratch() as directory, Feed(load) as feed:
        try:
            bridge.start(Stage(feed.host, feed.port, dsn, FILTER, directory, load.messages, click.echo))
            feed.go()
            time.sleep(WARM_UP_S)  # what runs once is not what is looked for
            before, began_s = feed.progress().acknowledged, time.monotonic()
            _spy(bridge, stacks, "raw", seconds, options)
            _spy(bridge, folder / "profile.svg", "flamegraph", seconds, options)
            done, took_s = feed.progress().acknowledged - before, time.monotonic() - began_s
        finally:
            bridge.stop()
    text = summary(stacks.read_text(), RATE * seconds)
    text = f"{done / took_s:,.0f} messages/s while it was recorded, which slows it\n\n{text}"
    (folder / "profile.txt").write_text(text)
    stacks.unlink()
    return text


def _spy(bridge: Bridge, path: Path, form: str, seconds: int, options: list[str]) -> None:
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if program is None:
        raise ProfileError('py-spy is not there: pip install "mqtt-bridge[bench]"')
    command = [program, "record", "--pid", str(bridge.pids()[0]), "--duration", str(seconds), "--rate", str(RATE)]
    command += ["--threads", "--format", form, "--output", str(path), *options]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode:
        said = (ended.stderr or ended.stdout).strip().splitlines()
        why = said[-1] if said else f"exit code {ended.returncode}"
        raise ProfileError(f"py-spy could not look at the bridge ({why}): as root, or with kernel.yama.ptrace_scope=0?")


def summary(stacks: str, samples: int) -> str:
    """The functions in which each thread was found most, from py-spy's raw format: `thread;frame;...;frame count`."""
    threads: dict[str, Counter[str]] = {}
    for thread, leaf, count in _leaves(stacks):
        threads.setdefault(thread, Counter())[leaf] += count
    lines, waiting = [], []
    for thread, leaves in sorted(threads.items(), key=lambda item: -item[1].total()):
        if max(leaves.values()) >= WAITS * leaves.total():
            waiting.append(thread)
            continue
        lines.append(f"{thread}: busy in {leaves.total() / samples:.1%} of the samples")
        lines += [f"  {count / samples:6.1%}  {leaf}" for leaf, count in leaves.most_common(TOP)]
        lines.append("")
    return "\n".join([*lines, *([f"found in one place only, so waiting: {', '.join(waiting)}"] if waiting else [])])


def _leaves(stacks: str) -> Iterator[tuple[str, str, int]]:
    for line in stacks.splitlines():
        frames, _, count = line.rpartition(" ")
        parts = frames.split(";")
        threads = [part for part in parts if part.startswith("thread")]
        thread = threads[0].partition(": ")[2] or threads[0] if threads else "all threads"
        # `function (file:line)`: all lines of a function are one.
        function, _, file = parts[-1].partition(" (")
        yield thread, f"{function} ({file.partition(':')[0]})" if file else function, int(count)
