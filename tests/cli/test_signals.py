"""SIGTERM and SIGHUP end a run as Ctrl-C does: cleaned up, with an exit code of their own."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.cli.app import run
from flexmerge_cli.cli.signals import Interrupted, interrupting_signals

from ..families import plain, write_family
from ..program import Child, fails, succeeds

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folders = write_family(tmp_path_factory.mktemp("family"), plain(num_tasks=2))
    succeeds("plan", *folders.arguments, "-o", folders.root / "plan.json")
    return folders


@pytest.mark.parametrize("number", SIGNALS)
def test_a_merge_that_is_ended_cleans_up_and_exits_with_128_and_the_signals_number(family, number, tmp_path):
    def ended_while_weights_are_read() -> None:
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # ignored, where the tests run under nohup
        read = Reader.read

        def first(*arguments):
            Reader.read = read
            os.kill(os.getpid(), number)
            return read(*arguments)

        Reader.read = first

    plan, out = family.root / "plan.json", tmp_path / "out"
    out.mkdir()
    child = Child("merge", plan, "--method", "average", "-o", out / "b", "--json", before=ended_while_weights_are_read)
    code, printed = child.wait()
    document, _, message = printed.partition("\n")
    assert code == 128 + number and message == "interrupted\n"
    assert json.loads(document) == {"error": {"message": "interrupted", "hint": None, "exit_code": code}}
    assert list(out.iterdir()) == []


def test_the_same_signal_again_kills(tmp_path):
    script = (
        "import os, signal, time\nfrom flexmerge_cli.cli.signals import interrupting_signals\n"
        "with interrupting_signals():\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n        os.kill(os.getpid(), signal.SIGHUP); print('cleaned', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGTERM); time.sleep(9); print('lives')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "cleaned\n"), "a hang-up after it does not disturb"


def test_what_is_ignored_stays_ignored_and_all_is_as_before_afterwards():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with interrupting_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_run_in_another_thread_leaves_signals_alone():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_an_exit_that_a_library_makes_is_no_success(monkeypatch):
    from flexmerge_cli.report import methods

    monkeypatch.setattr(methods, "method_list", lambda: sys.exit(0))
    fails(1, "methods", says="ended the program")
