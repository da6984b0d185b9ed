"""The documents say what the code does: names, defaults, examples and links are compared with the code.

Blocks between `<!-- generated: NAME -->` and `<!-- end -->` are written by this module:

    python -m tests.unit.test_docs      # rewrites all of them
"""

from __future__ import annotations

import ast
import configparser
import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from prometheus_client import ProcessCollector

from benchmarks import documents
from mqtt_bridge import cli, errors
from mqtt_bridge import settings as settings_module
from mqtt_bridge.metrics import METRICS, PROCESS_METRICS
from mqtt_bridge.routes import Router, default_routes
from mqtt_bridge.settings import NAMES, Settings, describe
from mqtt_bridge.tools.explain import explain

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mqtt_bridge"
FOLDERS = [ROOT, ROOT / "docs", ROOT / "benchmarks"]
DOCUMENTS = sorted([*(path for folder in FOLDERS for path in folder.glob("*.md")), *(ROOT / "tests").rglob("*.md")])
COMMANDS = cli.group.commands

# --- Generated blocks ------------------------------------------------------------------------------------------------

ARRIVAL = datetime(2026, 10, 1, 12, tzinfo=UTC)
"""When the messages of docs/formats.md arrive."""

BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def settings_table(_: list[list[str]]) -> list[str]:
    """Broker, database, bridge, HTTP and logs; within them as in the class."""
    order = ["MQTT", "DATABASE", "DB", "BRIDGE", "HTTP", "LOG"]
    listed = sorted(describe(Settings()), key=lambda setting: order.index(setting.name.partition("_")[0]))
    rows = [(f"`{s.name}`", f"`{s.default}`" if s.default else "", s.description + _missing(s.name)) for s in listed]
    return _table(("Setting", "Default", "Meaning"), rows)


def _missing(name: str) -> str:
    absent = settings_module._NOT_IN_THIS_VERSION
    return " *Not in this version.*" if any(name.lower().startswith(prefix) for prefix in absent) else ""


def commands_table(_: list[list[str]]) -> list[str]:
    rows = [(f"`mqtt-bridge {_usage(command)}`", _sentence(command)) for command in COMMANDS.values()]
    return _table(("Command", "What it does"), sorted(rows))


def _usage(command: click.Command) -> str:
    arguments = [f"[{p.name.upper()}]" for p in command.params if isinstance(p, click.Argument)]
    options = [p.opts[0] for p in command.params if isinstance(p, click.Option) and not p.hidden]
    shown = [f"[{option}]" for option in options[:3]] + (["[...]"] if len(options) > 3 else [])
    return " ".join([str(command.name), *arguments, *shown])


def _sentence(command: click.Command) -> str:
    return " ".join((command.help or "").partition("\n\n")[0].split())


def metrics_table(_: list[list[str]]) -> list[str]:
    rows = [(f"`{m.name}`", m.kind, f"`{m.label}`" if m.label else "", m.help) for m in (*METRICS, *PROCESS_METRICS)]
    return _table(("Metric", "Type", "Label", "Meaning"), rows)


def payloads_table(rows: list[list[str]]) -> list[str]:
    """What becomes of each payload on devices/d1/telemetry."""
    return _table(
        ("Payload", "Becomes"),
        [(row[0], _becomes("devices/{device}/telemetry", "devices/d1/telemetry", row[0])) for row in rows],
    )


def topics_table(rows: list[list[str]]) -> list[str]:
    """The same for topics: the device, and the rows."""
    shown = []
    for patterns, topic, payload in (row[:3] for row in rows):
        explained = _explain(_bare(patterns), _bare(topic), payload)
        devices = {row["device"] for row in explained["rows"]}
        device = f"`{devices.pop()}`" if devices else ""
        shown.append((patterns, topic, payload, device, _becomes(_bare(patterns), _bare(topic), payload)))
    return _table(("`MQTT_TOPICS`", "Topic", "Payload", "Device", "Becomes"), shown)


def _explain(patterns: str, topic: str, payload: str) -> dict:
    return explain(Router(default_routes(patterns)), topic, _payload(payload), at=ARRIVAL)


def _payload(cell: str) -> bytes:
    text = _bare(cell)
    return ast.literal_eval(text) if re.match(r"b['\"]", text) else text.encode()


def _becomes(patterns: str, topic: str, payload: str) -> str:
    explained = _explain(patterns, topic, payload)
    if explained["outcome"] == "ignored":
        return f"ignored: `{explained['error']}`"
    if explained["outcome"] == "dead_lettered":
        return f"dead letter: {explained['error']}"
    times = {row["time"] for row in explained["rows"]}
    shown = [f"at `{time}`" for time in times if time] + [_reading(row) for row in explained["rows"]]
    return "<br>".join(shown)


def _reading(row: dict) -> str:
    parts = [f"`{row['value']}`"] if row["value"] is not None else []
    parts += [f"`{json.dumps(row['value_text'], ensure_ascii=False)}`"] if row["value_text"] is not None else []
    return f"`{row['metric']}` {' and '.join(parts)}"


def connect_table(_: list[list[str]]) -> list[str]:
    rows = [(f"`{_readable(pattern)}`", remedy) for pattern, remedy in errors._CONNECT_REMEDIES]
    return _table(("The reason says", "Remedy"), rows)


def _readable(pattern: str) -> str:
    return pattern.replace(".*", "…").replace("|", " / ")


def sqlstates_table(_: list[list[str]]) -> list[str]:
    known = sorted({**errors._BY_SQLSTATE, **dict.fromkeys(errors._SQLSTATE_REMEDIES)})
    rows = [(f"`{code}`", _verdict(code), errors._SQLSTATE_REMEDIES.get(code, "")) for code in known]
    return _table(("SQLSTATE", "Verdict", "Remedy"), rows)


def _verdict(code: str) -> str:
    return next(errors._BY_SQLSTATE[code[:n]].value for n in (5, 3, 2) if code[:n] in errors._BY_SQLSTATE)


def refusals_table(_: list[list[str]]) -> list[str]:
    return _table(("The broker says", "Remedy"), [(f"`{name}`", text) for name, text in errors._REFUSALS.items()])


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its header."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def _bare(cell: str) -> str:
    return cell.removeprefix("`").removesuffix("`")


def how_fast(_: list[list[str]]) -> list[str]:
    """The latest results of the benchmarks, in short."""
    return documents.content("how-fast")


def results(_: list[list[str]]) -> list[str]:
    """All of them."""
    return documents.content("results")


GENERATORS: dict[str, Callable[[list[list[str]]], list[str]]] = {
    "settings": settings_table,
    "commands": commands_table,
    "metrics": metrics_table,
    "payloads": payloads_table,
    "topics": topics_table,
    "connect": connect_table,
    "sqlstates": sqlstates_table,
    "refusals": refusals_table,
    "how-fast": how_fast,
    "results": results,
}


def regenerated(text: str) -> str:
    """A document with its generated blocks as they should be."""
    return BLOCK.sub(lambda found: found[1] + "\n".join([*GENERATORS[found[2]](_rows(found[3])), found[4]]), text)


def write_generated_blocks() -> None:
    for path in DOCUMENTS:
        path.write_text(regenerated(path.read_text()))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_generated_blocks_are_what_the_code_says_now(path: Path) -> None:
    text = path.read_text()

    assert regenerated(text) == text, "Run: python -m tests.unit.test_docs"


def test_every_generator_is_used_so_that_every_table_is_there() -> None:
    used = {found[2] for path in DOCUMENTS for found in BLOCK.finditer(path.read_text())}

    assert used == GENERATORS.keys()


# --- Names -----------------------------------------------------------------------------------------------------------


def code_spans(text: str) -> Iterator[str]:
    """Everything between backticks: in a line, and the lines of fenced blocks."""
    fenced = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for block in fenced.findall(text):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", fenced.sub("", text))


def everywhere(pattern: str) -> set[tuple[str, str]]:
    """(document, what was found) for a pattern in the code spans of all documents but the change log."""
    return {
        (path.name, found)
        for path in DOCUMENTS
        if path.name != "CHANGELOG.md"
        for span in code_spans(path.read_text())
        for found in re.findall(pattern, span)
    }


def test_every_setting_that_is_named_exists() -> None:
    named = everywhere(r"\b(?:MQTT|DB|DATABASE|BRIDGE|HTTP|LOG)_[A-Z_]*[A-Z]\b")

    assert named
    assert {(path, name) for path, name in named if name not in NAMES} == set()


def test_every_metric_that_is_named_exists() -> None:
    process = {f"{m.name}_total" if m.type == "counter" else m.name for m in ProcessCollector(registry=None).collect()}
    named = {(path, name) for path, name in everywhere(r"\b(?:mqtt_bridge|process)_[a-z_]+\b") if name.count("_") > 1}

    known = {m.name for m in (*METRICS, *PROCESS_METRICS)} | process
    assert {(path, name) for path, name in named if name not in known} == set()
    assert process <= {name for path, name in named if path == "metrics.md"}


def test_every_command_and_option_that_is_named_exists() -> None:
    named = everywhere(r"(?:^|\s|/)mqtt-bridge ([a-z][^`|;#)]*)")
    commands = {(path, line.split()[0]) for path, line in named}
    options = {(line.split()[0], option) for _, line in named for option in re.findall(r"(?<!\S)\[?(--[a-z-]+)", line)}

    assert {(path, name) for path, name in commands if name not in COMMANDS} == set()
    assert {(name, option) for name, option in options if option not in options_of(name)} == set()


def options_of(name: str) -> set[str]:
    command = COMMANDS[name]
    members = command.commands.values() if isinstance(command, click.Group) else ()
    parameters = [parameter for each in (command, *members) for parameter in each.params]
    return {"--help"} | {option for parameter in parameters for option in parameter.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_of_its_own(name: str) -> None:
    shown = CliRunner().invoke(cli.group, [name, "--help"])

    assert shown.exit_code == 0
    assert f"mqtt-bridge {name}" in shown.output.partition("Examples:")[2]


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = everywhere(r"(?:^|\s)make ([a-z]+)")

    assert named
    assert {(path, name) for path, name in named if name not in targets} == set()


# --- Paths and links -------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_internal_links_lead_somewhere(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        if "://" not in target and (not linked.exists() or (anchor and anchor not in anchors(linked))):
            broken.append(target)

    assert not broken


def mapped() -> list[str]:
    """The paths on the map of ARCHITECTURE.md."""
    block = re.search(r"## The map\n.*?```\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    assert block is not None
    return [line.split()[0] for line in block[1].splitlines() if line and not line.startswith(" ")]


def test_what_is_on_the_map_exists() -> None:
    assert [path for path in mapped() if not (ROOT / path).exists()] == []


def test_every_module_is_on_the_map() -> None:
    folders = tuple(path for path in mapped() if path.endswith("/"))
    modules = [path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")]

    missing = [path for path in modules if path not in mapped() and not path.startswith(folders)]

    assert [path for path in missing if not path.endswith(("/__init__.py", "/__main__.py"))] == []


# --- The log ---------------------------------------------------------------------------------------------------------


def warnings_of_the_program() -> Iterator[str]:
    """The constant part of every warning, or worse, that the bridge can log."""
    loud = {"warning", "error", "critical", "exception", "level"}
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", None))
            if isinstance(node, ast.Call) and name in loud and node.args:
                yield max(_constants(node.args[0]), key=len)


def _constants(node: ast.expr) -> list[str]:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return [str(part.value) for part in parts if isinstance(part, ast.Constant)] or [""]


@pytest.mark.parametrize("sentence", sorted(set(warnings_of_the_program()) - {""}))
def test_every_warning_of_the_log_is_explained(sentence: str) -> None:
    explained = " ".join((ROOT / "docs/troubleshooting.md").read_text().split())

    first_clause = next(filter(str.strip, re.split("[;:]", sentence)))
    assert first_clause.strip() in explained


def test_every_sentence_that_is_quoted_is_one_of_the_program() -> None:
    sources = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    said = "\n".join(
        node.value
        for source in sources
        for node in ast.walk(source)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    document = BLOCK.sub("", (ROOT / "docs/troubleshooting.md").read_text())
    quoted = [part for span in re.findall(r"^\| `([^`]+)` \|", document, re.MULTILINE) for part in span.split("…")]

    assert quoted
    assert [part for part in quoted if part.strip() not in said] == []


def reasons() -> Iterator[str]:
    """Why the bridge is not ready, or not healthy, as far as the code that decides it has whole sentences."""
    for name in ("health", "watchdog", "bridge", "member"):
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.Call) and _called(node) in ("append", "Sign") and node.args:
                yield from _texts(node.args[0])
            if isinstance(node, ast.Dict):
                yield from (text for key in node.keys if key for text in _texts(key) if text.endswith("dead"))


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _texts(node: ast.AST) -> list[str]:
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


@pytest.mark.parametrize("reason", sorted(set(reasons())))
def test_every_reason_of_not_ready_and_not_healthy_is_explained(reason: str) -> None:
    explained = (ROOT / "docs/troubleshooting.md").read_text()

    assert f"`{reason.partition(':')[0]}" in explained


# --- The version -----------------------------------------------------------------------------------------------------


def test_the_change_log_begins_with_the_version_of_the_package() -> None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")

    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert versions[0] == metadata["metadata"]["version"]


if __name__ == "__main__":
    write_generated_blocks()
