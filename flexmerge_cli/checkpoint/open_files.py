"""More files open at once than a process may have at first: a bundle has one for every set of tasks that share a block.

The limit that it begins with is often 256 or 1,024, and it may raise it itself, up to another.
"""

import errno
import resource
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Opened = TypeVar("Opened")
Arguments = ParamSpec("Arguments")

MOST_FILES = 1 << 16  # where there is no limit to raise it to


def open_one_more(
    opened: Callable[Arguments, Opened], *arguments: Arguments.args, **options: Arguments.kwargs
) -> Opened:
    """`opened` of the arguments; again with a higher limit, if that is what it failed of. Raises OSError."""
    try:
        return opened(*arguments, **options)
    except OSError as error:
        if error.errno != errno.EMFILE or not _raise_limit():
            raise
    return opened(*arguments, **options)


def _raise_limit() -> bool:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= most:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):  # a system that has a limit beside the one it tells
        return False
    return True
