"""Turns signals that end a run into exceptions: SIGTERM and SIGHUP clean up and end it like Ctrl-C."""

import os
import signal
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
    """A signal arrived that ends the run. number: the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@dataclass(slots=True)
class Signals:
    """The state of signal handling during one run."""

    is_over: bool = False
    """Whether the run was interrupted and has cleaned up. Further Ctrl-Cs are ignored."""


@contextmanager
def interrupting_signals() -> Iterator[Signals]:
    """Raise Interrupted in the main thread on these signals; a second SIGTERM or SIGHUP kills the process as usual.

    Signals that are ignored stay ignored (nohup).
    """
    ours = {number: before for number, before in DEFAULTS.items() if signal.getsignal(number) is before}
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    process, signals = os.getpid(), Signals()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked child, which has nothing to clean up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if signals.is_over and number == signal.SIGINT:
            return
        for each in set(ours) - {signal.SIGINT}:  # a hang-up often follows a termination: one clean-up is enough
            signal.signal(each, signal.SIG_DFL if each == number else signal.SIG_IGN)
        raise Interrupted(number)

    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield signals
    finally:
        for number, before in ours.items():
            signal.signal(number, before)
