"""Links to PostgreSQL that understand a little of what passes: they overhear it, and hold a COMMIT, or its answer.

    with CommitTrap(postgres.port, holds="answer") as link:
        ... connect through link.port ...
        link.arm()
        link.wait()         # a COMMIT has been sent, and its answer is held back
        link.cut()          # the answer is lost; `release` would have let it pass

Threads: as in `proxy`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Literal

from tests.proxy import TcpProxy
from tests.waiting import wait_until

COMMIT = b"COMMIT\0"
"""The end of a simple Query message."""
_RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s


class Wiretap(TcpProxy):
    """Overhears both sides: libpq keeps most codes of FATAL to itself."""

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port)
        self.heard = b""

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            self.heard += data
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()

    def wait_for(self, sqlstate: str) -> None:
        """Until the server has said this code, in the field C of an ErrorResponse or NoticeResponse."""
        wait_until(lambda: b"\0C%b\0" % sqlstate.encode() in self.heard, what=f"the server to say {sqlstate}")


class CommitTrap(Wiretap):
    """Once armed, holds back the next COMMIT, or the answer to it.

    What was held back goes on with `release`, and is lost with `cut`.
    """

    def __init__(self, port: int, *, holds: Literal["request", "answer"]) -> None:
        super().__init__(port)
        self.holds = holds
        self._armed = False
        self._sprung = threading.Event()
        # Touched by the loop's thread only:
        self._released = asyncio.Event()
        self._trapped: asyncio.Task[None] | None = None

    def arm(self) -> None:
        """Hold the next COMMIT (or its answer); it can be set again when the last one has been cut."""
        self._sprung.clear()
        self._armed = True

    def wait(self) -> None:
        """Until a COMMIT has come."""
        assert self._sprung.wait(20), "no COMMIT came"

    def release(self) -> None:
        """Let pass what is held back."""

        async def release() -> None:
            self._released.set()

        self._call(release())

    def orphan(self) -> None:
        """Reset the client's side of the trapped connection only: to the server the transaction lives on."""

        async def orphan() -> None:
            assert self._trapped is not None
            near = self._links[self._trapped][0]
            near.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            near.transport.abort()

        self._call(orphan())

    async def _relay(self, *ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        (request, to_database), (answer, to_client) = ways
        task, mine = asyncio.current_task(), asyncio.Event()

        async def pass_request(data: bytes) -> None:
            if not self._armed or COMMIT not in data:
                return
            self._armed, self._trapped = False, task
            mine.set()
            self._sprung.set()
            if self.holds == "request":
                await self._released.wait()

        async def pass_answer(_: bytes) -> None:
            if mine.is_set() and self.holds == "answer":
                await self._released.wait()

        await super()._relay((_Held(request, pass_request), to_database), (_Held(answer, pass_answer), to_client))


class _Held(asyncio.StreamReader):
    """A reader whose data waits until `allowed` has returned."""

    def __init__(self, reader: asyncio.StreamReader, allowed: Callable[[bytes], Awaitable[None]]) -> None:
        super().__init__()
        self._reader = reader
        self._allowed = allowed

    async def read(self, n: int = -1) -> bytes:
        data = await self._reader.read(n)
        await self._allowed(data)
        return data
