"""A full load on the feed during which the bridge is killed: is every message there, and once?

It proves that what is measured is the bridge with its ledger on, and that the feed redelivers as a broker does.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.bench import Bench
from benchmarks.contestants.bridge import Bridge
from benchmarks.feed import Feed
from benchmarks.telemetry import Load
from benchmarks.trial import on_feed

NAME = "crash"
QUESTION = "Killed with kill -9 in the middle of a full load: is every message stored once?"

KILLS = (0.2, 0.5, 0.8)
"""After these shares of the messages."""


def measure(bench: Bench) -> dict[str, Any]:
    """The outcome, and how many messages were sent twice."""
    bridge, messages = Bridge(), bench.scale.feed_messages

    def kill(feed: Feed) -> None:
        for share in KILLS:
            while feed.progress().acknowledged < share * messages:
                time.sleep(0.01)
            bridge.kill()
            bench.say(f"killed after {share:.0%} of the messages")
            bridge.launch()

    outcome = on_feed(bench.servers, bridge, Load(messages), say=bench.say, during=kill)
    return {"kills": len(KILLS), "outcome": outcome.as_json()}
