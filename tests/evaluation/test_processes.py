"""One pool of processes for scores: order, errors, workers that die, and Ctrl-C."""

import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from flexmerge_cli.errors import DataError, MachineError
from flexmerge_cli.evaluation.processes import in_processes

from ..program import Child
from .jobs import prepare, unprepared, wait_for


def test_results_are_in_order_of_processes_that_are_prepared_once_and_have_one_thread(tmp_path):
    waited: list[int] = []
    found = in_processes(partial(prepare, tmp_path), "abcd", parallel=2, on_job=waited.append)
    assert [job for job, _, _ in found] == list("abcd") and waited == [0, 1, 2, 3]
    assert {threads for _, _, threads in found} == {1}
    assert all(len(pids) == 1 for _, pids, _ in found) and os.getpid() not in {pids[0] for _, pids, _ in found}


def test_what_a_job_raises_ends_the_others_which_clean_up(tmp_path):
    """The others were waited for, however long they took."""
    start = time.monotonic()
    with pytest.raises(DataError, match="job fails") as raised:
        in_processes(partial(prepare, tmp_path), ["fail", "sleep"], parallel=2)
    assert raised.value.hint == "do something" and time.monotonic() - start < 50
    assert (tmp_path / "cleaned").exists() and not multiprocessing.active_children()


def test_a_process_that_dies_is_the_machine_s_failure(tmp_path):
    with pytest.raises(MachineError, match="a worker process died") as raised:
        in_processes(partial(prepare, tmp_path), ["die", "sleep"], parallel=2)
    assert "--parallel" in (raised.value.hint or "") and not multiprocessing.active_children()


def test_what_cannot_be_prepared_is_told_as_any_other_error(capfd):
    """An initialiser's error is printed with its traceback, and the pool is merely broken."""
    with pytest.raises(DataError, match="nothing is prepared"):
        in_processes(unprepared, ["a"], parallel=2)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["starting", "working"])
def test_an_interrupt_ends_all_processes_without_a_traceback(sample, tmp_path, moment, number):
    """A terminal sends Ctrl-C to all of them, a job's manager its signal to the first alone."""
    script = f"echo $$ > {tmp_path}/pid-{{task}}; exec sleep 60"
    tasks = {task: {"kind": "command", "command": ["sh", "-c", script, "{checkpoint}"]} for task in sample.spec.tasks}
    spec = tmp_path / "eval.yaml"
    spec.write_text(yaml.safe_dump({"version": 1, "not_scored": ["parity"], "tasks": tasks}))
    arguments = ("eval", "--sources", "--plan", sample.plan_path, "--spec", spec, "--allow-exec", "--parallel", 2)
    child = Child(*arguments, before=os.setsid)
    pids = [tmp_path / f"pid-{task}" for task in tasks]
    if moment == "working":
        for path in pids:
            wait_for(path)
    else:
        while len(workers := children(child.pid)) < 2:
            time.sleep(0.01)
    begun = time.monotonic()
    (os.killpg if number == signal.SIGINT else os.kill)(child.pid, number)
    code, printed = child.wait()
    assert code == 128 + number and "Traceback" not in printed and printed.endswith("interrupted\n"), printed
    assert time.monotonic() - begun < 30
    for pid in [int(path.read_text()) for path in pids] if moment == "working" else workers:
        while is_alive(pid) and time.monotonic() - begun < 30:
            time.sleep(0.01)
        assert not is_alive(pid)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in found.read_text().split()] if found.exists() else []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
