"""paho's client with a fast way in: it reads the socket by the buffer, not by the byte.

paho takes two or three calls of `recv` and one of `select` for a packet, and makes a dict and a message object of it:
about 100 us of CPU at QoS 1. Here one method, `_packet_read`, takes what the socket has, hands on whole runs of
PUBLISH packets, and leaves every other packet to paho's own handlers, as complete as paho would have read it.
PUBACKs go out by the run as well: one write for all of them.

The method is private in paho, and what it leans on is too. So `why_unfit` looks whether the paho that is installed
has the shape that is expected, and has a client read one packet of each kind; where it does not, the bridge runs on
`stock_client`, which needs public parts only.

Threads: the network thread reads; `acknowledge` may be called by any, it only appends to paho's output queue.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import paho.mqtt
import paho.mqtt.client as mqtt
import paho.mqtt.properties
from paho.mqtt import MQTTException
from paho.mqtt.client import MQTT_LOG_ERR
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes

from mqtt_bridge.model import Run
from mqtt_bridge.publish_packet import PUBLISH, MalformedPublish, PublishReader, extent

READ_BYTES = 1 << 16
"""Asked of the socket at a time: enough for some 500 messages."""
PARTING_BYTES = 1 << 23
"""Thrown away at a time after the goodbye: more than the kernels on both sides hold of a connection that was closed."""
_PUBACK = 0x4002_0000
"""A PUBACK (MQTT 3.1.1 section 3.4, MQTT 5 section 3.4) as a number, but for its packet id in the lower half."""

_DISCONNECT = PacketTypes.DISCONNECT << 4
DISLIKES = (
    MQTTException,
    getattr(paho.mqtt.properties, "MQTTException", MQTTException),  # another class of that name, before 2.2
    struct.error,
    LookupError,
    ValueError,
)
"""What paho raises of a packet that it cannot read: before 2.2 whatever happens then."""

_GOODBYE = bytes.fromhex("e0 00")
"""DISCONNECT, normal: MQTT 3.1.1 section 3.14, MQTT 5 section 3.14."""

OnRun = Callable[[Run], object]
OnMalformed = Callable[[MalformedPublish], object]


class FastClient(mqtt.Client):
    """Hands `on_run` the messages as they come, in runs, and `on_malformed` what ends the connection."""

    def __init__(self, on_run: OnRun, on_malformed: OnMalformed, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_run = on_run
        self._on_malformed = on_malformed
        self._reader = PublishReader(is_v5=self._protocol == MQTTProtocolVersion.MQTTv5)
        self._begun = bytearray()  # a packet that is not complete yet
        self._parting = False
        self._received = 0
        self._missing = 0  # how much of it is still to come, at least
        # paho 2.0 and 2.1 call it by the second name.
        self._last_in = "_last_bytes_received" if hasattr(self, "_last_bytes_received") else "_last_msg_in"

    def acknowledge(self, packet_ids: Sequence[int]) -> None:
        """Queue the PUBACKs of these, in this order, as one write."""
        packets = struct.pack(f">{len(packet_ids)}I", *[_PUBACK | packet_id for packet_id in packet_ids])
        self._packet_queue(PacketTypes.PUBACK << 4, packets, 0, 1)

    def take_received(self) -> int:
        """Bytes received since this was asked last."""
        received, self._received = self._received, 0
        return received

    def part(self) -> None:
        """Queue DISCONNECT, and from now on throw away what comes.

        Not as paho does it, which closes the socket at once, with unread data in it.
        """
        self._parting = True
        self._packet_queue(PacketTypes.PUBACK << 4, _GOODBYE, 0, 1)  # as what it is, paho would close behind it

    # -- reading, in paho's stead

    def _packet_read(self) -> MQTTErrorCode:
        """Called by paho when the socket has something to read."""
        received, most = 0, PARTING_BYTES if self._parting else READ_BYTES
        while received < most:
            try:
                # paho's websocket gives a bytearray, in 2.0 and 2.1; of bytes no copy is made.
                data = bytes(self._sock_recv(max(READ_BYTES, self._missing)))
            except BlockingIOError:
                return MQTTErrorCode.MQTT_ERR_AGAIN
            except OSError as error:
                self._easy_log(MQTT_LOG_ERR, "failed to receive on socket: %s", error)
                return MQTTErrorCode.MQTT_ERR_CONN_LOST
            if not data:
                return MQTTErrorCode.MQTT_ERR_CONN_LOST
            self._note_sign_of_life()
            self._received += len(data)
            rc = MQTTErrorCode.MQTT_ERR_SUCCESS if self._parting else self._read(data)
            if rc != MQTTErrorCode.MQTT_ERR_SUCCESS or self._sock is None:
                return rc
            received += len(data)
            if type(self._sock) is socket.socket and len(data) < READ_BYTES and not self._parting:
                break  # it has no more. TLS and websockets may hold some back, of which `select` does not know.
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _note_sign_of_life(self) -> None:
        """Feed the clock by which paho tells a broker that is silent."""
        with self._msgtime_mutex:
            setattr(self, self._last_in, time.monotonic())

    def _read(self, data: bytes) -> MQTTErrorCode:
        """Hand on every packet that is complete with `data`, and keep the rest."""
        if self._begun:
            self._begun += data
            self._missing -= len(data)
            if self._missing > 0:  # of a large one: it is not looked at again and again
                return MQTTErrorCode.MQTT_ERR_SUCCESS
            data, self._begun = bytes(self._begun), bytearray()
        try:
            rc, end = self._walk(data)
            if rc == MQTTErrorCode.MQTT_ERR_SUCCESS and end < len(data):
                self._begin(data, end)
            return rc
        except MalformedPublish as error:
            self._on_malformed(error)
            return MQTTErrorCode.MQTT_ERR_PROTOCOL

    def _begin(self, data: bytes, start: int) -> None:
        self._begun += data[start:]
        found = extent(data, start)
        self._missing = found[1] - len(data) if found else 1

    def _walk(self, data: bytes) -> tuple[MQTTErrorCode, int]:
        """Handle all complete packets: what became of it, and where the rest begins."""
        position, size = 0, len(data)
        while position < size:
            if data[position] & 0xF0 == PUBLISH:
                run, position = self._reader.read_run(data, position)
                if run is None:
                    break
                self._on_run(run)
            else:
                found = extent(data, position)
                if found is None or found[1] > size:
                    break
                rc = self._hand_to_paho(data[position], data[found[0] : found[1]])
                position = found[1]
                if rc != MQTTErrorCode.MQTT_ERR_SUCCESS or self._sock is None:
                    return rc, size
        return MQTTErrorCode.MQTT_ERR_SUCCESS, position

    def _hand_to_paho(self, command: int, body: bytes) -> MQTTErrorCode:
        """Have paho handle a packet that is no PUBLISH, as if it had read it itself."""
        if command == _DISCONNECT:
            body = body.ljust(3, b"\x00")  # 2.0 and 2.1 overlook a reason that stands alone: it is all that many send
        self._in_packet = _packet(command, body)
        try:
            return self._packet_handle()
        except DISLIKES as error:
            if is_of_paho(error):
                raise MalformedPublish(f"a packet of type {command >> 4} that cannot be read: {error!r}") from error
            raise
        finally:
            self._in_packet = _packet(0, b"")


def is_of_paho(error: BaseException) -> bool:
    """Whether it was raised in paho's own code: not in a callback, where it would be a bug of the bridge."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and str(traceback.tb_frame.f_globals.get("__name__")).startswith("paho.")


def _packet(command: int, body: bytes) -> Any:
    """paho's account of a packet that was read to its end; of none at all where the command is 0."""
    return {
        "command": command,
        "have_remaining": int(command != 0),
        "remaining_count": [],
        "remaining_mult": 1,
        "remaining_length": len(body),
        "packet": bytearray(body),
        "to_process": 0,
        "pos": 0,
    }


# -- is it the paho that this was made for?


def why_unfit() -> str | None:
    """Why the paho that is installed cannot be read this way; None where it can.

    It is tried: a client reads a packet of paho's, two messages and half a third, from a socket that is none.
    """
    version = getattr(paho.mqtt, "__version__", "unknown")
    if version.split(".")[:2] not in _KNOWN:
        return f"paho-mqtt {version} is not one of those that it was made for (2.0, 2.1, 2.2)"
    try:
        seen = _rehearse()
    except Exception as error:  # noqa: BLE001 - whatever paho has become
        return f"paho-mqtt {version} fails when it is tried: {type(error).__name__}: {error}"
    return None if seen == _EXPECTED else f"paho-mqtt {version} does something else when it is tried: {seen}"


_KNOWN = (["2", "0"], ["2", "1"], ["2", "2"])
_SUBACK = bytes.fromhex("90 04 0007 00 01")
_MESSAGES = bytes.fromhex("32 07 0001 74 0001 00 61") + bytes.fromhex("32 07 0001 74 0002 00 62")
_EXPECTED = ["subscribed 7", "received [1, 2]", "queued 4002000140020002"]


def _rehearse() -> list[str]:
    seen: list[str] = []
    client = FastClient(
        lambda run: seen.append(f"received {run.packet_ids}"),
        lambda error: seen.append(str(error)),
        CallbackAPIVersion.VERSION2,
        protocol=MQTTProtocolVersion.MQTTv5,
        manual_ack=True,
    )
    client.on_subscribe = lambda _client, _userdata, packet_id, *_: seen.append(f"subscribed {packet_id}")
    client.on_socket_register_write = lambda *_: None
    if set(client._in_packet) != set(_packet(0, b"")):
        return [f"packets are read into {sorted(client._in_packet)}"]
    if not hasattr(client, client._last_in):
        return ["the clock of its keepalive has another name"]
    client._sock = _Socket([_SUBACK + _MESSAGES, _MESSAGES[:5]])  # type: ignore[assignment]
    try:
        for _ in range(2):
            client.loop_read()
        client.acknowledge([1, 2])
        seen.append(f"queued {client._out_packet[-1]['packet'].hex()}")
    finally:
        client._sock = None
    return seen


class _Socket:
    """Gives out what it was given."""

    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks

    def recv(self, _size: int) -> bytes:
        if not self._chunks:
            raise BlockingIOError
        return self._chunks.pop(0)
