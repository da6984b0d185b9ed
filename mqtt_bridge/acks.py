"""In-order release: when may which PUBACK be sent?

One `AckTracker` serves one subscriber for its whole life. It keeps the receive order of the *current* connection and
lets acknowledgements go in that order only (MQTT 5, section 4.6), each as soon as everything before it is finished.

Invariants: (1) a PUBACK is sent only for a delivery that was declared finished; (2) the PUBACKs of a connection are a
prefix of its receive order; (3) a PUBACK goes only to the connection that delivered the message: when a connection
ends its order is forgotten, and what was unacknowledged comes back from the broker on the next one.

Threads: the network thread opens, closes and adds, workers finish. One lock guards all fields; `send` is called under
it, since two workers that released side by side could otherwise swap their acknowledgements.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

SendAcks = Callable[[Sequence[int]], object]
"""Queues the PUBACKs for these packet ids, in this order; must not block."""


class AckTracker:
    """Receive order of the current connection, and which of it is finished."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._send: SendAcks | None = None  # None while there is no connection
        self._order: deque[tuple[int, int]] = deque()  # (position, packet id), oldest first
        self._unfinished: set[int] = set()  # positions in _order that are not finished
        self._unproven: deque[int] = deque()  # positions acknowledged on this connection, oldest first
        self._sent = 0  # PUBACKs sent on this connection
        self._proven = 0  # those of them that the broker is known to have seen

    def open(self, send: SendAcks) -> None:
        """Begin the receive order of a new connection."""
        with self._lock:
            self._forget()
            self._send = send

    def close(self) -> None:
        """The connection is gone: nothing may be sent until the next `open`."""
        with self._lock:
            self._forget()
            self._send = None

    def _forget(self) -> None:
        self._order.clear()
        self._unfinished.clear()
        self._unproven.clear()
        self._sent = self._proven = 0

    def add(self, position: int, packet_id: int, *, finished: bool = False) -> None:
        """A delivery was received on this connection; `finished` when it had been committed before."""
        with self._lock:
            if self._send is None:
                return  # the connection ended meanwhile: the broker will deliver again
            self._order.append((position, packet_id))
            if finished:
                self._release()
            else:
                self._unfinished.add(position)

    def add_run(self, positions: Sequence[int], packet_ids: Sequence[int]) -> None:
        """Deliveries were received on this connection, in this order; none of them is finished."""
        with self._lock:
            if self._send is not None:
                self._order.extend(zip(positions, packet_ids, strict=True))
                self._unfinished.update(positions)

    def finish(self, positions: Iterable[int]) -> None:
        """These deliveries are durable, or ignored on purpose. Positions of earlier connections do no harm."""
        with self._lock:
            self._unfinished.difference_update(positions)
            self._release()

    def _release(self) -> None:
        """Send what has become a finished prefix. Decided under the lock, so that the order on the wire holds."""
        if self._send is None:
            return
        order, unfinished = self._order, self._unfinished
        packet_ids = []
        while order and order[0][0] not in unfinished:
            position, packet_id = order.popleft()
            packet_ids.append(packet_id)
            self._unproven.append(position)
        if packet_ids:
            self._send(packet_ids)
            self._sent += len(packet_ids)

    @property
    def head(self) -> int | None:
        """Position of the oldest unacknowledged delivery of this connection: what all later ones wait for."""
        try:
            return self._order[0][0]
        except IndexError:
            return None

    @property
    def unacknowledged(self) -> int:
        """Deliveries of this connection whose PUBACK has not been sent."""
        return len(self._order)

    @property
    def unproven(self) -> int:
        """Acknowledgements sent on this connection that no barrier has proven yet."""
        return len(self._unproven)

    @property
    def outstanding(self) -> int:
        """What the broker may still hold as in flight: unacknowledged, or acknowledged without proof."""
        with self._lock:
            # Decided under the lock: on its way from one to the other a delivery is in neither.
            return len(self._order) + len(self._unproven)

    def mark(self) -> int:
        """A mark for a barrier that is sent now: everything acknowledged up to here precedes it on the wire."""
        with self._lock:
            return self._sent

    def prove(self, mark: int) -> list[int]:
        """The barrier with this mark was answered: returns the positions whose PUBACK the broker has seen."""
        with self._lock:
            count = min(mark - self._proven, len(self._unproven))
            self._proven = max(mark, self._proven)
            return [self._unproven.popleft() for _ in range(max(count, 0))]
