"""A TCP proxy that misbehaves on command: for cut, silent, slow and refused connections.

Everything runs in one thread with an asyncio loop; the methods may be called from any thread and return when the
thing is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Self

from tests.packets import cut

_CHUNK_BYTES = 65_536
_RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s


class TcpProxy:
    """Forwards `port` on loopback to a target: `with TcpProxy("127.0.0.1", broker.port) as proxy: ...`"""

    host = "127.0.0.1"

    def __init__(
        self, target_host: str, target_port: int, *, delay_s: float = 0.0, tls: ssl.SSLContext | None = None
    ) -> None:
        """With `tls` clients have to speak TLS to it; the target does not hear of that."""
        self.delay_s = delay_s
        """Added to every chunk, each way; may be changed at any time."""
        self.port = 0
        self.accepted = 0
        """Connections so far."""
        self._target = (target_host, target_port)
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        # All below is touched by the loop's thread only.
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._flowing = asyncio.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        self._flowing.set()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._links)

    def cut(self) -> None:
        """Reset (RST) every connection, on both sides; new ones are accepted."""
        self._call(self._reset())

    def stall(self) -> None:
        """Forward nothing any more, tell nobody: connections stay open, nothing is lost."""
        self._call(self._set_flowing(False))

    def resume(self) -> None:
        """Forward again, beginning with what was held back."""
        self._call(self._set_flowing(True))

    def refuse(self) -> None:
        """New connections are refused (nobody listens); existing ones live on: `cut` them as well for an outage."""
        self._call(self._unlisten())

    def accept(self) -> None:
        """New connections are accepted again, on the same port."""
        self._call(self._listen())

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, self.host, self.port, ssl=self._tls)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _unlisten(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _set_flowing(self, flowing: bool) -> None:
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.accepted += 1
        self._links[task] = [writer]
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):  # cancelled by a cut
                far_reader, far_writer = await asyncio.open_connection(*self._target)
                self._links[task].append(far_writer)
                await self._relay((reader, far_writer), (far_reader, writer))
        finally:
            for open_writer in self._links.pop(task):
                open_writer.close()

    async def _relay(self, *ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        """Both ways, until one side ends."""
        pumps = [asyncio.ensure_future(self._pump(reader, writer)) for reader, writer in ways]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()

    async def _reset(self) -> None:
        tasks = list(self._links)
        for writer in [writer for writers in self._links.values() for writer in writers]:
            if writer.transport.is_closing():
                continue
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            writer.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _end(self) -> None:
        await self._unlisten()
        await self._reset()
        await asyncio.sleep(0)  # transports close their sockets one turn of the loop later
        await asyncio.sleep(0)


class Fragmenter(TcpProxy):
    """Hands everything on in pieces of these sizes, over and over, each written by itself: over TLS a record each."""

    def __init__(
        self, target_host: str, target_port: int, *, sizes: Sequence[int], tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(target_host, target_port, tls=tls)
        self._sizes = sizes

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            for piece in cut(data, self._sizes):
                await self._flowing.wait()
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)  # so that pieces are sent one by one where the other side is quick enough
