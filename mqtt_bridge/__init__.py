"""Moves MQTT messages into PostgreSQL: nothing lost, nothing twice."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mqtt-bridge")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
