"""Measures what a call does apart from its result: the calls of functions it makes, the same on every machine, and the
threads it leaves behind."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def num_calls(run: Callable[[], object]) -> int:
    """Count calls of functions in Python and in C by this thread."""
    count = 0

    def on_event(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


@contextmanager
def no_thread_outlives() -> Iterator[None]:
    """Fail if a thread that began in the block still lives at its end; those of earlier tests may live on, or end."""
    before = set(threading.enumerate())
    yield
    assert not [thread.name for thread in threading.enumerate() if thread not in before]
