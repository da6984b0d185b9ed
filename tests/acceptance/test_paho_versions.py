"""Every paho-mqtt that setup.cfg allows does: the tests of receiving pass with the oldest of each minor version too.

The one that is installed is what all other tests run with. The others are fetched into the cache of the embedded
servers, and come first on the path of a pytest of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import paho.mqtt
import pytest

from mqtt_bridge.tools.embedded.account import cache_directory
from tests.program import environment

ROOT = Path(__file__).resolve().parents[2]
MINOR_VERSIONS = ["2.0", "2.1", "2.2"]
OTHERS = [version for version in MINOR_VERSIONS if not paho.mqtt.__version__.startswith(f"{version}.")]

PLUGINS = ["-p", "tests.expected_paho", "-p", "no:cacheprovider"]
TESTS = [
    "tests/unit/test_fast_client.py",
    "tests/integration/test_receiving.py",
    *(
        f"tests/integration/test_subscriber.py::test_{name}"
        for name in (
            "a_refusal_is_kept_as_the_problem_and_tried_again",
            "a_broker_that_takes_over_the_session_is_quoted[fast]",  # stock paho overlooks it before 2.2
            "a_broker_that_accepts_the_connection_and_then_is_silent_is_left_after_the_keepalive[fast]",
            "pubacks_leave_in_receive_order_however_the_commits_come",
            "it_disconnects_only_when_every_acknowledgement_is_proven",
            "what_was_committed_before_a_cut_is_acknowledged_again_and_not_stored",
            "the_network_thread_survives_garbage_and_goes_on_with_the_next_connection",
            "an_error_of_the_bridge_itself_costs_the_connection_and_not_the_thread",
            "a_full_queue_that_gets_room_in_time_costs_no_connection",
            "messages_come_over_websockets_and_through_a_cut",
            "messages_come_over_tls_with_a_client_certificate",
            "a_link_that_cuts_again_and_again_loses_and_doubles_nothing",
        )
    ),
]


def paho_of(version: str) -> Path:
    """A folder with this paho-mqtt and nothing else."""
    folder = cache_directory() / "paho-mqtt" / f"{version}.0"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            target = Path(name) / folder.name
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
            subprocess.run([*command, f"paho-mqtt=={folder.name}"], check=True, timeout=120)
            if not folder.exists():  # else another test has been faster
                os.replace(target, folder)
    return folder


def test_the_versions_are_those_that_are_allowed():
    (allowed,) = re.findall(r"^ +paho-mqtt(\S+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)

    assert allowed == ">=2.0,<2.3"
    assert len(OTHERS) == len(MINOR_VERSIONS) - 1, f"what is installed is {paho.mqtt.__version__}"


@pytest.mark.parametrize("version", OTHERS)
def test_messages_are_received_alike_with_another_paho(version):
    folder = paho_of(version)
    variables = environment(PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]), EXPECTED_PAHO=folder)

    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.expected_paho",
            "-p",
            "no:cacheprovider",
            "-q",
            "-n",
            "2",
            *TESTS,
        ],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )

    print(ended.stdout[-8000:], ended.stderr[-4000:])
    assert ended.returncode == 0
    assert int(re.search(r"(\d+) passed", ended.stdout).group(1)) > 300
    assert "skipped" not in ended.stdout
