"""A sample of tests/faults.py, which takes minutes: some calls of each command, failed in each way and killed."""

import random

import pytest

from .faults import COMMANDS, ERRORS, Bench

SAMPLED = 4


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_fails_the_old_or_the_new_output_is_there_and_the_command_can_be_run_again(name, bench):
    calls = bench.calls(name)
    assert {"open", "write", "fsync"} <= set(calls) and {"rename", "replace", "renameat2"} & set(calls)
    draw = random.Random(name)
    for kind in (*ERRORS, "SIGKILL"):
        for number in sorted(draw.sample(range(1, len(calls) + 1), SAMPLED // 2 if kind in ERRORS else SAMPLED)):
            assert bench.problems(name, number, kind) == [], f"{kind} at call {number}, {calls[number - 1]}"
