"""Runs jobs in several processes, with a function that each process prepares once, and yields their results in order.

Every process computes with one thread. No process outlives the call: on an error, and if this process is interrupted,
the others are asked to end and clean up. They ignore Ctrl-C, which a terminal sends to all of them.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from flexmerge_cli.errors import MachineError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Job = TypeVar("Job")
Result = TypeVar("Result")
Work = Callable[[Job], Result]


def in_processes(
    prepare: Callable[[], Work[Job, Result]],
    jobs: Sequence[Job],
    *,
    parallel: int,
    on_job: Callable[[int], None] = lambda _number: None,
) -> list[Result]:
    """Run the jobs, at most `parallel` of them at a time, and return their results.

    prepare: returns the function that does a job; called once in every process. Jobs and results are pickled, too.
    on_job: called with the number of the job that is awaited.
    Raises whatever `prepare` or the first failing job raises, and MachineError if a process dies.
    """
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(min(parallel, len(jobs)), multiprocessing.get_context("spawn"), _begin, (prepare,))
    futures, results = [], []
    try:
        for job in jobs:
            with _signals_held():
                futures.append(pool.submit(_run, job))
        for number, future in enumerate(futures):
            on_job(number)
            results.append(future.result())
    except BaseException as error:
        workers = [process for process in multiprocessing.active_children() if process not in others]
        for worker in workers:
            worker.terminate()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise MachineError(
                "a worker process died, most likely killed for lack of memory", hint="use a lower --parallel"
            ) from error
        raise
    pool.shutdown()
    return results


@contextmanager
def _signals_held() -> Iterator[None]:
    """Delay signals that end a run until a process has started: an interrupted start prints a traceback.

    The new process delays them, too, until it can handle them. Blocking them in this thread is not enough here: another
    thread may receive the signal, and Python runs handlers in the main thread all the same.
    """
    came: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    held = [number for number in SIGNALS if is_main and signal.getsignal(number) not in (signal.SIG_IGN, None)]
    handlers = {number: signal.signal(number, lambda number, _frame: came.append(number)) for number in held}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


class _Ended(SystemExit):
    """Ends this process, which was asked to end."""


_prepare: Callable[[], Work[Any, Any]]
_work: Work[Any, Any] | None = None


def _begin(prepare: Callable[[], Work[Any, Any]]) -> None:
    """Prepare a process. Nothing here may fail: errors of an initialiser are printed, and not raised in the parent."""

    def end(number: int, _frame: object) -> None:
        raise _Ended(128 + number)

    global _prepare
    _prepare = prepare
    signal.signal(signal.SIGINT, lambda *_signal: None)  # not SIG_IGN, which programs started by a job would inherit
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a signal that arrived meanwhile ends this process silently
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def _run(job: Any) -> Any:
    global _work
    try:
        if _work is None:
            import torch

            torch.set_num_threads(1)  # the processes share the cores
            _work = _prepare()
        return _work(job)
    except _Ended as ended:  # the pool would treat it as an error of a job, and give this process another job
        os._exit(int(str(ended.code)))
