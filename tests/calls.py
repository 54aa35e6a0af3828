"""How much work something is, in calls of functions: the same on every machine, unlike its time."""

import sys
from collections.abc import Callable


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
