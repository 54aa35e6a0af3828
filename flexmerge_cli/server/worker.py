"""Computes in one thread: rows of all requests wait in one bounded queue, and run batch by batch across tasks.

Rows that come while texts are generated join at the next token, as far as the batch has room.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from flexmerge_cli.server.refusal import Refusal
from flexmerge_cli.server.tasks import Task
from flexmerge_cli.serving.runtime import Run, Runtime

MAX_RUNS = 4
"""The number of runs from which no more join: each runs its own model, and only shared products are taken together."""


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """One input of one task."""

    task: str
    item: Any
    """The input as the task's `prepare` returned it."""
    answer: "Future[Any]" = field(default_factory=Future)
    run: int = 0
    """The number of the run that computes it, once there is one."""


class BatchWorker:
    """Runs rows with the models of a runtime. `submit` may be called from any thread."""

    def __init__(
        self,
        runtime: Runtime,
        tasks: Mapping[str, Task],
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
        on_batch: Callable[[Sequence[Row]], None] = lambda _rows: None,
    ) -> None:
        """Prepare a worker.

        max_batch: the most rows of a batch. max_wait: seconds that an incomplete batch waits for more. max_queue: the
        most rows that wait. on_batch: called with every batch.
        """
        self._runtime, self._tasks, self._on_batch = runtime, tasks, on_batch
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait, max_queue
        self._waiting: deque[Row] = deque()
        self._running: Sequence[Row] = ()
        self._changed = threading.Condition()
        self._num_runs = 0
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_stopping

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows, all or none. Raises Refusal."""
        self.require_room(len(rows))
        with self._changed:
            if self._is_stopping:
                raise Refusal("the server is stopping", status=503, code="stopping")
            if len(self._waiting) + len(rows) > self._max_queue:
                said = f"{len(self._waiting)} inputs are waiting already, of at most {self._max_queue}: try again"
                raise Refusal(said, status=503, code="overloaded")
            self._waiting.extend(rows)
            self._changed.notify()

    def require_room(self, count: int) -> None:
        """Raise Refusal for more rows than may ever wait."""
        if count > self._max_queue:
            raise Refusal(f"{count} inputs in one request, and at most {self._max_queue} may wait: send fewer")

    def stop(self, seconds: float) -> bool:
        """Refuse new rows and end running and waiting ones. Returns whether this was done within `seconds`."""
        with self._changed:
            self._is_stopping = True
            for row in (*self._running, *self._waiting):
                self._tasks[row.task].cancel(row.item)
            _fail(self._waiting, Refusal("the server is stopping", status=503, code="stopping"))
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while rows := self._next_batch():
            joining = self._joining if any(self._tasks[row.task].has_pauses for row in rows) else None
            try:
                self._runtime.run_in_lockstep(self._runs(rows), joining)
            except BaseException as error:
                _fail(self._running, error)

    def _next_batch(self) -> Sequence[Row]:
        """Return the next batch; empty at the end."""
        with self._changed:
            self._running = []
            while not self._running and not self._is_stopping:
                while not self._waiting and not self._is_stopping:
                    self._changed.wait()
                until = time.monotonic() + self._max_wait
                while len(self._waiting) < self._max_batch and (left := until - time.monotonic()) > 0:
                    if self._is_stopping:
                        break
                    self._changed.wait(left)
                self._running = self._taken(self._max_batch)
            return self._running

    def _taken(self, count: int) -> list[Row]:
        """Take at most `count` of the rows that have waited longest, without those that nobody waits for any more."""
        found: list[Row] = []
        while self._waiting and len(found) < count:
            row = self._waiting.popleft()
            if row.answer.set_running_or_notify_cancel():
                found.append(row)
        return found

    def _joining(self) -> list[Run]:
        """Return the runs that join the running ones between two tokens: as many rows as the batch has room for.

        If there are many separate runs, rows wait until one of them ends, and then join in fewer, larger runs.
        """
        with self._changed:
            going = [row for row in self._running if not row.answer.done()]
            is_full = self._is_stopping or len({row.run for row in going}) >= MAX_RUNS
            rows = [] if is_full else self._taken(self._max_batch - len(going))
            self._running = going + rows
        return self._runs(rows) if rows else []

    def _runs(self, rows: Sequence[Row]) -> list[Run]:
        self._on_batch(rows)
        of_task: dict[str, list[Row]] = {}
        for row in rows:
            of_task.setdefault(row.task, []).append(row)
        runs: list[Run] = []
        for name, own in of_task.items():
            rows_of = {id(row.item): row for row in own}
            for items in self._tasks[name].batches([row.item for row in own]):
                batch = [rows_of[id(item)] for item in items]
                self._num_runs += 1
                for row in batch:
                    row.run = self._num_runs
                runs.append((name, self._answering(name, batch)))
        return runs

    def _answering(self, name: str, rows: Sequence[Row]) -> Callable[[Any], None]:
        """Return a function that runs these rows, and whose failure does not affect other rows."""

        def deliver(number: int, answer: Any) -> None:
            rows[number].answer.set_result(answer)

        def run(model: Any) -> None:
            try:
                self._tasks[name].run(model, [row.item for row in rows], deliver)
            except Exception as error:
                _fail(rows, error)

        return run


def _fail(rows: Iterable[Row], error: BaseException) -> None:
    for row in rows:
        if not row.answer.done():
            row.answer.set_exception(error)
