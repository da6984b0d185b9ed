"""A connection per payload: how this project began, and how many bridges do.

`on_message` connects, inserts the readings one by one, commits, closes. paho acknowledges when the callback returns,
hence after the commit. Nothing is tuned: it stands for what it is. Its cost is the server's, which starts a process
for every message.
"""

from __future__ import annotations

from typing import Any

import orjson
import paho.mqtt.client as mqtt
import psycopg2

from benchmarks.handmade import HandMade, connect, database, device

INSERT = "INSERT INTO readings (time, device, metric, value) VALUES (to_timestamp(%s / 1000.0), %s, %s, %s)"


def on_message(client: mqtt.Client, userdata: Any, message: mqtt.MQTTMessage) -> None:
    """One message, one connection."""
    readings = orjson.loads(message.payload)
    ts = readings.pop("ts")
    connection = psycopg2.connect(database())
    with connection.cursor() as cursor:
        for metric, value in readings.items():
            cursor.execute(INSERT, (ts, device(message.topic), metric, value))
    connection.commit()
    connection.close()


class ConnectionPerPayload(HandMade):
    """This module as a contestant."""

    name = "connection-per-payload"
    title = "paho and psycopg2, a connection and four INSERTs per message"
    guarantees = "acknowledges after the commit; a failure to store ends the process"
    at_most = 2_000


CONTESTANTS = (ConnectionPerPayload(),)

if __name__ == "__main__":
    connect(on_message).loop_forever()
