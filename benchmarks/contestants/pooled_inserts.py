"""A pool of connections and a pool of threads, an INSERT per reading, a commit per message: the usual second version.

paho acknowledges when `on_message` returns, which is when the message was handed to the threads. Four threads and
connections: 8 and 16 stored less, in a run each.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import orjson
import paho.mqtt.client as mqtt
from psycopg2 import pool

from benchmarks.contestants.connection_per_payload import INSERT
from benchmarks.handmade import HandMade, connect, database, device

THREADS = 4


class Bridge:
    """Takes messages on paho's thread, stores them on others."""

    def __init__(self) -> None:
        self._connections = pool.ThreadedConnectionPool(THREADS, THREADS, database())
        self._threads = ThreadPoolExecutor(THREADS)

    def on_message(self, client: mqtt.Client, userdata: Any, message: mqtt.MQTTMessage) -> None:
        """One message, one task."""
        self._threads.submit(self._store, message.topic, message.payload).add_done_callback(_complain)

    def _store(self, topic: str, payload: bytes | bytearray) -> None:
        readings = orjson.loads(payload)
        ts = readings.pop("ts")
        connection = self._connections.getconn()
        try:
            with connection, connection.cursor() as cursor:
                for metric, value in readings.items():
                    cursor.execute(INSERT, (ts, device(topic), metric, value))
        finally:
            self._connections.putconn(connection)


def _complain(stored: Future[None]) -> None:
    if error := stored.exception():
        logging.error("A message is lost: %s", error)


class PooledInserts(HandMade):
    """This module as a contestant."""

    name = "pooled-inserts"
    title = "paho, four threads and pooled connections, an INSERT per reading, a commit per message"
    guarantees = "acknowledges on receipt: a crash loses what is queued in memory"
    at_most = 10_000


CONTESTANTS = (PooledInserts(),)

if __name__ == "__main__":
    connect(Bridge().on_message).loop_forever()
