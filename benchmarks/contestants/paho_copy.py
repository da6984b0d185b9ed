"""Stock paho and binary COPY: a good bridge by hand, on paho's public interface alone. The reference of all ratios.

`on_message` queues; two workers take what is there, up to 2,000 messages, decode it with orjson, COPY it in binary
form, commit, and acknowledge. A failure of the database ends the process; what was not acknowledged comes again to
whoever starts it next.

Left out of what mqtt-bridge does, which favours this one: routes, times in other formats than milliseconds, text
values, dead letters (a payload that is no JSON is acknowledged and forgotten), retries, metrics, the ledger (a crash
doubles what was committed and not yet acknowledged), and the order of acknowledgements. (MQTT 3.1.1 section 4.6 wants
the order of receipt; Mosquitto does not insist.)
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from functools import lru_cache
from io import BytesIO
from queue import Empty, SimpleQueue
from struct import Struct
from typing import Any

import orjson
import paho.mqtt.client as mqtt
import psycopg2

from benchmarks.contestant import REFERENCE
from benchmarks.handmade import HandMade, connect, database, device

WORKERS = 2
BATCH = 2_000

COPY = "COPY readings (time, device, metric, value) FROM STDIN WITH (FORMAT binary)"
HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
TRAILER = b"\xff\xff"
EPOCH_MS = 946_684_800_000
"""PostgreSQL counts microseconds from 2000-01-01."""


class Bridge:
    """paho's thread fills the queue, the workers empty it."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[mqtt.MQTTMessage] = SimpleQueue()

    def run(self) -> None:
        """For ever."""
        client = connect(self.on_message, manual_ack=True)
        for _ in range(WORKERS):
            threading.Thread(target=self._work, args=(client,)).start()
        client.loop_forever()

    def on_message(self, client: mqtt.Client, userdata: Any, message: mqtt.MQTTMessage) -> None:
        """Called by paho."""
        self._messages.put(message)

    def _work(self, client: mqtt.Client) -> None:
        try:
            connection = psycopg2.connect(database())
            while True:
                batch = self._take()
                with connection, connection.cursor() as cursor:
                    cursor.copy_expert(COPY, BytesIO(encode(batch)))
                for message in batch:
                    client.ack(message.mid, message.qos)
        except Exception:
            logging.exception("The rest is left to the broker")
            os._exit(1)

    def _take(self) -> list[mqtt.MQTTMessage]:
        batch = [self._messages.get()]
        try:
            while len(batch) < BATCH:
                batch.append(self._messages.get_nowait())
        except Empty:
            pass
        return batch


def encode(messages: Iterable[mqtt.MQTTMessage]) -> bytes:
    """The data of a COPY (PostgreSQL's documentation of COPY, "Binary Format")."""
    parts = [HEADER]
    for message in messages:
        try:
            readings = orjson.loads(message.payload)
        except orjson.JSONDecodeError:
            continue
        time_us = (readings.pop("ts") - EPOCH_MS) * 1_000
        source = device(message.topic).encode()
        for metric, value in readings.items():
            row, name = layout(len(source), metric)
            parts.append(row(4, 8, time_us, len(source), source, len(name), name, 8, value))
    parts.append(TRAILER)
    return b"".join(parts)


@lru_cache(maxsize=10_000)
def layout(device_bytes: int, metric: str) -> tuple[Any, bytes]:
    """How a row of this metric is packed, and the metric's name."""
    name = metric.encode()
    return Struct(f">hiqi{device_bytes}si{len(name)}sid").pack, name


class PahoCopy(HandMade):
    """This module as a contestant."""

    name = REFERENCE
    title = "stock paho, orjson, binary COPY in batches by two workers"
    guarantees = "acknowledges after the commit; a crash doubles what was committed last"


CONTESTANTS = (PahoCopy(),)

if __name__ == "__main__":
    Bridge().run()
