"""The links to broker and database: the proxy of the tests, made fit for being cut again and again under load."""

from __future__ import annotations

import asyncio
import contextlib

from tests.proxy import TcpProxy


class Link(TcpProxy):
    """A `TcpProxy` that can be cut while some of its connections are just ending by themselves."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # Python 3.11 prints a traceback for each that `cut` cancels
            await super()._serve(reader, writer)

    async def _reset(self) -> None:
        for writers in self._links.values():
            # The socket of a writer that is closing may be gone: it can be reset no more.
            writers[:] = [writer for writer in writers if not writer.transport.is_closing()]
        await super()._reset()
