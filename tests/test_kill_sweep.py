"""A joint model's run that is killed before operations on the disk ends with the same bits, and the sweep that says so can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def outcome():
    """What ``kill_sweep.py short`` reports."""
    command = [sys.executable, str(Path(__file__).with_name("kill_sweep.py")), "short"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_kill_before_an_operation_loses_nothing(outcome):
    report = outcome["sound"]
    assert report["faults"] == 0 and report["missed"] == 0 and report["valid"], report
    assert report["kills"] >= 3 and report["landed"] >= 3 and report["in_a_save"] >= 2, "the kills did not land where they show something"


def test_a_life_that_nobody_killed_is_no_kill(outcome):
    report = outcome["missed"]
    assert report["missed"] == 1 and report["kills"] == outcome["sound"]["kills"] and not report["valid"]
    assert "ended before operation" in report["trouble"][-1]


@pytest.mark.parametrize(("plant", "fault"), [("seeds", "differ"), ("in_place", "lost"), ("epoch", "order")])
def test_planted_faults_are_caught(outcome, plant, fault):
    assert outcome[plant]["kills"] == 1
    assert outcome[plant][fault] == 1, outcome[plant]
