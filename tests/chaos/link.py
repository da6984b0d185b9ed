"""The links to broker and database: the proxy of the tests, made fit for being cut again and again under load."""

from __future__ import annotations

import asyncio
import contextlib

from tests.proxy import TcpProxy


class Link(TcpProxy):
    """A `TcpProxy` that can be cut while some of its connections are just ending by themselves.

    It can also freeze one connection: what was just sent on it never arrives, and nothing after it, one way, while all
    other connections go on. So it is when a firewall forgets a connection.
    """

    freezing = False
    """Set it, and the next connection on which something is sent is frozen; then it is false again."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # Python 3.11 prints a traceback for each that `cut` cancels
            await super()._serve(reader, writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await super()._pump(_Freezable(self, reader), writer)  # type: ignore[arg-type]

    async def _reset(self) -> None:
        for writers in self._links.values():
            # The socket of a writer that is closing may be gone: it can be reset no more.
            writers[:] = [writer for writer in writers if not writer.transport.is_closing()]
        await super()._reset()


class _Freezable:
    """A reader that may swallow what it has read, and never return."""

    def __init__(self, link: Link, reader: asyncio.StreamReader) -> None:
        self._link = link
        self._reader = reader

    async def read(self, count: int) -> bytes:
        data = await self._reader.read(count)
        if data and self._link.freezing:
            self._link.freezing = False
            await asyncio.get_running_loop().create_future()  # until the connection is cut
        return data
