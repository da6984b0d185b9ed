"""The SQL of the documents, run against the tables that the bridge makes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
from psycopg2.extensions import connection as Connection

from mqtt_bridge import schema

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

EXAMPLES = [
    (path.name, block)
    for path in DOCUMENTS
    for block in re.findall(r"^```sql\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
]

FILL = """
INSERT INTO readings
SELECT now() - make_interval(mins => n), 'sensor-17', 'temperature', 20 + n, NULL FROM generate_series(0, 90) AS n;
INSERT INTO readings VALUES (now(), 'sensor-17', 'state', NULL, 'ok');
INSERT INTO mqtt_bridge.dead_letters (received_at, topic, payload, qos, retain, stage, error, client_id) VALUES
    (now(), 'devices/sensor-17/telemetry', '{"t":', 1, false, 'decode', 'not JSON', 'mqtt-bridge'),
    (now(), 'devices/sensor-18/telemetry', '\\xff00', 1, false, 'decode', 'not JSON', 'mqtt-bridge');
"""


@pytest.fixture
def filled(database: str) -> Iterator[Connection]:
    with closing(psycopg2.connect(database)) as connection:
        connection.autocommit = True
        schema.apply(connection)
        with connection.cursor() as cursor:
            cursor.execute(FILL)
        yield connection


def test_the_readme_has_examples() -> None:
    assert sum(name == "README.md" for name, _ in EXAMPLES) >= 3


@pytest.mark.parametrize(("document", "statements"), EXAMPLES, ids=lambda value: value.partition("\n")[0][:60])
def test_an_example_runs_and_a_query_finds_what_it_looks_for(
    filled: Connection, document: str, statements: str
) -> None:
    with filled.cursor() as cursor:
        for statement in filter(str.strip, statements.split(";")):
            cursor.execute(statement)

            assert cursor.description is None or cursor.fetchall(), f"{document}: nothing found"
