"""Signals that end a run: SIGTERM and SIGHUP clean up and end as Ctrl-C does."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int
DEFAULTS: dict[int, Handler] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}


class Interrupted(KeyboardInterrupt):
    """One of them came. number: the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@dataclass(slots=True)
class Signals:
    """What became of them."""

    is_over: bool = False
    """Whether a run was interrupted and has cleaned up: further Ctrl-Cs say nothing new."""


@contextmanager
def interrupting_signals() -> Iterator[Signals]:
    """They raise Interrupted in the main thread; SIGTERM or SIGHUP again kills, as it would without us.

    What is ignored stays so (nohup). Worker processes, which a signal to this one alone would not reach, are ended.
    """
    ours = {number: before for number, before in DEFAULTS.items() if signal.getsignal(number) is before}
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    process, signals = os.getpid(), Signals()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != process:  # forked from ours, and has nothing of ours to clean up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if signals.is_over and number == signal.SIGINT:
            return
        for each in set(ours) - {signal.SIGINT}:  # a hang-up often follows a termination: one clean-up is enough
            signal.signal(each, signal.SIG_DFL if each == number else signal.SIG_IGN)
        if "multiprocessing" in sys.modules:
            for worker in sys.modules["multiprocessing"].active_children():
                worker.terminate()
        raise Interrupted(number)

    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield signals
    finally:
        for number, before in ours.items():
            signal.signal(number, before)
