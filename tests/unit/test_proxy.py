"""The misbehaving proxy, checked with plain sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import paho.mqtt.client as mqtt
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from tests.proxy import TcpProxy
from tests.scripted_broker import ScriptedBroker
from tests.waiting import wait_until
from tests.websocket_relay import WebsocketRelay


@pytest.fixture
def echo_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_echo, args=(listener,), name="echo")
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def _echo(listener: socket.socket) -> None:
    """One connection after the other, until the listener is shut down."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            try:
                while data := connection.recv(65_536):
                    connection.sendall(data)
            except ConnectionError:
                continue


def _connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=5)


def _ask(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    answer = b""
    while len(answer) < len(data):
        answer += connection.recv(65_536)
    return answer


def test_bytes_travel_both_ways_unchanged(echo_port: int) -> None:
    data = bytes(range(256)) * 500

    with TcpProxy("127.0.0.1", echo_port) as proxy, _connect(proxy) as connection:
        answer = _ask(connection, data)

    assert answer == data


def test_a_cut_resets_the_connection_and_the_next_one_works(echo_port: int) -> None:
    with TcpProxy("127.0.0.1", echo_port) as proxy:
        with _connect(proxy) as connection:
            _ask(connection, b"before")

            proxy.cut()

            with pytest.raises(ConnectionResetError):
                connection.recv(10)
        with _connect(proxy) as connection:
            assert _ask(connection, b"after") == b"after"
        assert proxy.accepted == 2


def test_a_stalled_connection_is_silent_and_loses_nothing(echo_port: int) -> None:
    with TcpProxy("127.0.0.1", echo_port) as proxy, _connect(proxy) as connection:
        _ask(connection, b"before")

        proxy.stall()
        connection.sendall(b"held back")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(10)
        proxy.resume()

        connection.settimeout(5)
        assert connection.recv(100) == b"held back"


def test_connections_are_refused_until_accepted_again_on_the_same_port(echo_port: int) -> None:
    with TcpProxy("127.0.0.1", echo_port) as proxy:
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            _connect(proxy)

        proxy.accept()

        with _connect(proxy) as connection:
            assert _ask(connection, b"again") == b"again"


def test_a_delay_is_added_each_way(echo_port: int) -> None:
    with TcpProxy("127.0.0.1", echo_port, delay_s=0.1) as proxy, _connect(proxy) as connection:
        started = time.monotonic()

        _ask(connection, b"slow")

        assert time.monotonic() - started >= 0.2


def test_a_target_that_is_down_ends_the_connection_and_nothing_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with TcpProxy("127.0.0.1", port) as proxy, _connect(proxy) as connection:
        assert connection.recv(10) == b""
        wait_until(lambda: proxy.connections == 0, what="the proxy to forget the connection")


def test_a_proxy_ends_while_connections_are_open(echo_port: int) -> None:
    with TcpProxy("127.0.0.1", echo_port) as proxy:
        connection = _connect(proxy)
        _ask(connection, b"open")

    with connection, pytest.raises(ConnectionResetError):
        connection.recv(10)


def test_mqtt_over_websockets_reaches_the_broker_behind_the_relay() -> None:
    received: list[bytes] = []
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5, transport="websockets")
    client.on_message = lambda _client, _userdata, message: received.append(message.payload)
    client.ws_set_options(path="/mqtt")

    with ScriptedBroker() as broker, WebsocketRelay(broker.host, broker.port) as relay:
        client.connect(relay.host, relay.port)
        client.loop_start()
        broker.wait_for_connect()
        broker.publish(b"a/b", b"x" * 100_000, mid=5)
        broker.wait_for_pubacks(1)
        client.disconnect()
        client.loop_stop()

    assert received == [b"x" * 100_000]


def test_a_websocket_to_another_path_is_refused() -> None:
    with ScriptedBroker() as broker, WebsocketRelay(broker.host, broker.port) as relay:
        with pytest.raises(InvalidStatus) as refusal:
            connect(f"ws://{relay.host}:{relay.port}/elsewhere", subprotocols=[Subprotocol("mqtt")])

        assert refusal.value.response.status_code == 404
        assert broker.record.connects == []
