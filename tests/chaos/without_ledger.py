"""`mqtt-bridge` with its ledger switched off: no redelivery is recognised, no key of a batch is known already.

It exists to prove that the faults of a chaos run do bring duplicates where nobody prevents them. What is switched off
is patched in from here; the product has no such switch.
"""

from __future__ import annotations

import itertools

from psycopg2 import sql

from mqtt_bridge import ownership
from mqtt_bridge.cli import main
from mqtt_bridge.ledger import BatchKey, Entry, Ledger, Seen

_tries = itertools.count(1)
_statements = ownership.statements


def _never_recognise(self: Ledger, position: int, mark: bytes, *, dup: bool) -> Seen:
    return Seen.NEW


def _statements_with_a_key_of_their_own(client_id: str, entry: Entry, *, owner_epoch: int) -> sql.Composable:
    key = BatchKey(entry.key.owner_epoch, next(_tries))
    return _statements(client_id, entry._replace(key=key), owner_epoch=owner_epoch)


if __name__ == "__main__":
    Ledger._recognise = _never_recognise  # type: ignore[method-assign]
    ownership.statements = _statements_with_a_key_of_their_own
    main()
