"""A plugin for pytest: run with the paho that EXPECTED_PAHO names, in the folder that it names, or not at all.

EXPECTED_PAHO=/path/to/2.0.0 PYTHONPATH=/path/to/2.0.0:. python -m pytest -p tests.expected_paho ...
"""

from __future__ import annotations

import os
from pathlib import Path

import paho.mqtt.client
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run with another one."""
    expected = Path(os.environ["EXPECTED_PAHO"])
    loaded = Path(str(paho.mqtt.client.__file__))
    if not loaded.is_relative_to(expected) or paho.mqtt.__version__ != expected.name:
        raise pytest.UsageError(f"paho-mqtt {paho.mqtt.__version__} of {loaded} was loaded, not that of {expected}")


def pytest_report_header(config: pytest.Config) -> str:
    """For whoever reads what it says."""
    return f"loaded: paho-mqtt {paho.mqtt.__version__}"
