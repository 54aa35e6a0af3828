"""A sample of tests/faults.py, which takes minutes: some calls of each command, failed in each way and killed."""

import random

import pytest

from .faults import COMMANDS, ERRORS, Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_fails_the_old_or_the_new_output_is_there_and_the_command_can_be_run_again(name, bench):
    calls = bench.calls(name)
    assert {"open", "write", "fsync"} <= set(calls) and {"rename", "replace", "renameat2"} & set(calls)
    draw = random.Random(name)
    faults = [(kind, draw.randint(1, len(calls))) for kind in (*ERRORS, "SIGKILL", "SIGKILL")]
    for kind, number in (*faults, ("SIGKILL", len(calls))):  # the last call comes after the new output is there
        assert bench.problems(name, number, kind) == [], f"{kind} at call {number}, {calls[number - 1]}"
