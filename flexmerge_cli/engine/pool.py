"""Maps a function over a bounded window of work, in order; the only module with threads.

Items are taken in order and results come back in order, so that what is summed or written does not depend on which
thread was first. At most `threads + ahead` items exist at a time, which bounds memory.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TypeVar

import numpy as np

from flexmerge_cli.engine.upload import Uploads, adopting, arrived
from flexmerge_cli.later import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


AHEAD = 2  # items beyond those in progress, so that no thread waits for the reader of the results


def default_threads() -> int:
    """Return the number of cores that this process may use; beyond 16, memory bandwidth is the limit."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def ordered_map(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    *,
    threads: int,
    ahead: int = AHEAD,
    device: "torch.device | None" = None,
) -> closing[Generator[Result, None, None]]:
    """Return the results of `work`, in the order of the items. The first error, in that order, is raised; the rest is
    dropped.

    device: on which the threads compute, each on a stream of its own. Results then hold no tensors of it.

    Use it in a `with` block: at its end no worker runs any more, whatever the reader of the results did. A generator
    left to itself would live as long as the error's traceback, and its workers would go on writing into files that are
    closed.
    """
    return closing(_results(items, work, threads, ahead, device))


@contextmanager
def loading(device: "torch.device") -> Iterator[ThreadPoolExecutor]:
    """Give threads that read weights to a device, on the stream of the caller. At the end of the block all is there."""
    with arrived(device), ThreadPoolExecutor(default_threads(), initializer=adopting(device, own=False)) as pool:
        yield pool


def _results(
    items: Iterable[Item], work: Callable[[Item], Result], threads: int, ahead: int, device: "torch.device | None"
) -> Generator[Result, None, None]:
    pending: deque[Future[Result]] = deque()
    adopt = None if device is None else adopting(device, own=True)
    with ThreadPoolExecutor(threads, thread_name_prefix="flexmerge", initializer=_start, initargs=(adopt,)) as pool:
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


def _start(adopt: Callable[[], None] | None) -> None:
    """Make torch adopt its number of threads, and the stream; runs first in each worker.

    Until torch is asked for its number, a thread's matrix products run on all cores, and give other bits than on the
    one core that the engine set.
    """
    torch.get_num_threads()
    if adopt is not None:
        adopt()


def with_fallback(run: Callable[[], Result], on_cpu: Callable[[], Result], on_warning: Callable[[str], None]) -> Result:
    """Call `run`, or `on_cpu` if the GPU runs out of memory: slower, with the same bytes for elementwise work."""
    try:
        return run()
    except torch.OutOfMemoryError:
        pass  # The error holds what `run` had on the GPU, and is let go of first.
    torch.cuda.empty_cache()
    on_warning("the GPU is out of memory: part of the work runs on the CPU")
    return on_cpu()


ALIGNMENT = 64  # bytes of a cache line, and of the widest vector registers


class Buffers(threading.local):
    """Reused byte buffers, separate for each thread; the thread's next item overwrites their content. `upload` copies
    them to a GPU."""

    def __init__(self) -> None:
        self._arrays: dict[object, np.ndarray] = {}
        self.upload = Uploads()

    def get(self, key: object, num_bytes: int) -> np.ndarray:
        """Return an aligned array, uint8, of at least num_bytes."""
        array = self._arrays.get(key)
        if array is None or array.size < num_bytes:
            self._arrays.pop(key, None)  # This frees it before the larger one is made.
            array = self._arrays[key] = aligned(num_bytes)
        return array

    def drop(self) -> None:
        """Free this thread's memory: nothing that `get` returned before may be read any more."""
        self._arrays.clear()


def aligned(num_bytes: int) -> np.ndarray:
    """Return an uninitialised array, uint8. Where memory is aligned differently, BLAS sums in another order, which
    would show in the bits of sums."""
    array = np.empty(num_bytes + ALIGNMENT, np.uint8)
    return array[-array.ctypes.data % ALIGNMENT :][:num_bytes]
