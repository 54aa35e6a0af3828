"""Ordered map over a bounded window of work: the one place with threads.

Items are taken in order and results come back in order, so that what is summed or written does not depend on which
thread was first. At most `threads + ahead` items exist at a time; that bounds memory.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import numpy as np

from flexmerge_cli.later import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


AHEAD = 2  # items beyond those that the threads are at: none waits for the reader of the results


def default_threads() -> int:
    """The cores that this process may use; more than 16 do not pay against memory bandwidth."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def ordered_map(
    items: Iterable[Item], work: Callable[[Item], Result], *, threads: int, ahead: int = AHEAD
) -> closing[Generator[Result, None, None]]:
    """Results of `work`, in the order of the items. The first error, in that order, is raised; the rest is dropped.

    To be used in a `with`: at its end no worker runs any more, whatever the reader of the results did. A generator left
    to itself would live as long as the error's traceback, and its workers would write on, into files that are closed.
    """
    return closing(_results(items, work, threads, ahead))


def _results(
    items: Iterable[Item], work: Callable[[Item], Result], threads: int, ahead: int
) -> Generator[Result, None, None]:
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="flexmerge", initializer=_start) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) >= threads + ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _start() -> None:
    """Run first in each worker: torch takes over its number of threads when it is asked for it.

    Until then a thread's matrix products run on all cores, and give other bits than on the one that the engine set.
    """
    torch.get_num_threads()


def with_fallback(run: Callable[[], Result], on_cpu: Callable[[], Result], on_warning: Callable[[str], None]) -> Result:
    """`run`, or on the CPU where the GPU has no memory left for it: slower, and the same elementwise bytes."""
    try:
        return run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        on_warning("the GPU is out of memory: part of the work runs on the CPU")
        return on_cpu()


ALIGNMENT = 64  # bytes: of a cache line, and of the widest vector registers


class Buffers(threading.local):
    """Reused byte buffers, each thread its own: what is read into one is gone with the thread's next item."""

    def __init__(self) -> None:
        self._arrays: dict[object, np.ndarray] = {}

    def get(self, key: object, num_bytes: int) -> np.ndarray:
        """uint8, at least num_bytes long, aligned."""
        array = self._arrays.get(key)
        if array is None or array.size < num_bytes:
            self._arrays.pop(key, None)  # before the larger one is made
            array = self._arrays[key] = aligned(num_bytes)
        return array

    def drop(self) -> None:
        """Give this thread's memory back: nothing that was got before may be read any more."""
        self._arrays.clear()


def aligned(num_bytes: int) -> np.ndarray:
    """uint8, not set. BLAS adds up in another order where memory is aligned in another way: it would show in sums."""
    array = np.empty(num_bytes + ALIGNMENT, np.uint8)
    return array[-array.ctypes.data % ALIGNMENT :][:num_bytes]
