"""Raises the limit on open files when necessary: a bundle has a file for every set of tasks that share a block.

The soft limit is often 256 or 1,024, and a process may raise it up to the hard limit.
"""

import errno
import resource
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Opened = TypeVar("Opened")
Arguments = ParamSpec("Arguments")

MOST_FILES = 1 << 16  # if there is no hard limit


def open_one_more(
    opened: Callable[Arguments, Opened], *arguments: Arguments.args, **options: Arguments.kwargs
) -> Opened:
    """Call `opened`; retry with a higher limit if it failed because of too many open files. Raises OSError."""
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
    except (OSError, ValueError):  # some systems have a further limit besides the reported one
        return False
    return True
