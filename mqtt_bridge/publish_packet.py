"""PUBLISH as it stands on the wire (MQTT 3.1.1 section 3.3, MQTT 5 section 3.3), read by the run.

One `PublishReader` serves one connection: topic aliases live as long as that. It lies on the hot path: its one loop
runs once a message, and nothing in it is called or made that can do without.

Threads: the network thread alone.
"""

from __future__ import annotations

from mqtt_bridge import publish_properties
from mqtt_bridge.model import Properties, Run
from mqtt_bridge.publish_properties import TOPIC_ALIAS, variable_length

PUBLISH = 0x30
"""Type of the packet, in the upper half of its first byte."""


class MalformedPublish(Exception):
    """The lengths in a packet contradict each other, or it is none that a broker may send to a QoS 1 subscriber."""


class PublishReader:
    """Reads the PUBLISH packets of one connection."""

    def __init__(self, *, is_v5: bool) -> None:
        self._is_v5 = is_v5
        self._aliases = TopicAliases()

    def read_run(self, data: bytes, start: int) -> tuple[Run | None, int]:
        """The packets that begin at `start`, are complete and have the same flags; and where the next one begins.

        None where not even the first is complete. Raises MalformedPublish when the first is malformed: those before it
        were returned by then, and count.
        """
        flags = data[start]
        qos = flags >> 1 & 3
        if qos > 1:
            raise MalformedPublish(f"a message of QoS {qos}, though nothing above QoS 1 was asked for")
        is_v5, packet_id, size = self._is_v5, 0, len(data)
        topics: list[bytes] = []
        payloads: list[bytes] = []
        packet_ids: list[int] = []
        properties: list[Properties] = []
        try:
            while start + 1 < size and data[start] == flags:
                length = data[start + 1]
                position = start + 2
                if length > 0x7F:
                    length, position = variable_length(data, start + 1)
                end = position + length
                if end > size:
                    break  # the rest of it is still to come
                start_of_topic = position + 2
                position = start_of_topic + (data[position] << 8 | data[position + 1])
                topic = data[start_of_topic:position]
                if qos:
                    packet_id = data[position] << 8 | data[position + 1]
                    position += 2
                own: Properties = None
                if is_v5:
                    length = data[position]
                    position += 1
                    if length:  # seldom
                        own, topic, position = self._read_properties(data, position - 1, end, topic)
                if position > end or not topic or (qos and not packet_id):
                    raise IndexError
                topics.append(topic)
                payloads.append(data[position:end])
                packet_ids.append(packet_id)
                properties.append(own)
                start = end
        except (IndexError, OverflowError) as error:
            # After others this one is looked at again, as the first.
            if not topics and is_complete(data, start):
                raise MalformedPublish("a PUBLISH whose lengths contradict each other, or without its topic") from error
        if not topics:
            return None, start
        return Run(topics, payloads, packet_ids, properties, qos, bool(flags & 1), bool(flags & 8)), start

    def _read_properties(self, data: bytes, start: int, end: int, topic: bytes) -> tuple[Properties, bytes, int]:
        """The properties whose length begins at `start`, the topic they may stand for, and where they end."""
        length, start = variable_length(data, start)
        stop = start + length
        if stop > end:
            raise IndexError
        topic, found = self._aliases.resolve(topic, publish_properties.decode(data[start:stop]))
        return found, topic, stop


class TopicAliases:
    """Numbers that stand for topics on one connection (MQTT 5, section 3.3.2.3.4).

    The bridge allows none; a broker that sends them all the same is understood.
    """

    def __init__(self) -> None:
        self._topics: dict[int, bytes] = {}

    def resolve(self, topic: bytes, properties: Properties) -> tuple[bytes, Properties]:
        """The topic that is meant, empty where the alias is unknown; and the properties without the alias."""
        if properties is None or TOPIC_ALIAS not in properties:
            return topic, properties
        alias = properties[TOPIC_ALIAS]
        if topic:
            self._topics[alias] = topic
        rest = {name: value for name, value in properties.items() if name != TOPIC_ALIAS}
        return self._topics.get(alias, b""), rest or None


def extent(data: bytes, start: int) -> tuple[int, int] | None:
    """Where the body of the packet at `start` begins and ends, be that beyond `data`; None where that is still to come.

    MalformedPublish when its length does not end.
    """
    try:
        length, body = variable_length(data, start + 1)
    except IndexError:
        return None
    except OverflowError as error:
        raise MalformedPublish("a packet whose length does not end") from error
    return body, body + length


def is_complete(data: bytes, start: int) -> bool:
    """Whether the packet at `start` is there to its end. MalformedPublish as `extent`."""
    found = extent(data, start)
    return found is not None and found[1] <= len(data)
