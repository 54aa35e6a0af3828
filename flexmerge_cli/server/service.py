"""What the routes of the server share: the tasks, the worker, and the limits."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flexmerge_cli.errors import FlexmergeError, machine_failure
from flexmerge_cli.server.generation import Choice
from flexmerge_cli.server.metrics import Metrics
from flexmerge_cli.server.refusal import Refusal
from flexmerge_cli.server.tasks import Task
from flexmerge_cli.server.worker import Row, Worker

log = logging.getLogger("uvicorn.error")
MAX_NAMED = 50
"""Tasks that an error names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A runtime's tasks, ready to be asked."""

    tasks: dict[str, Task]
    worker: Worker
    metrics: Metrics
    max_body: int
    """Bytes of a request."""

    def task(self, name: str) -> Task:
        """Raises Refusal for a task that is not served."""
        if name not in self.tasks:
            listed = ", ".join(list(self.tasks)[:MAX_NAMED]) + (", …" if len(self.tasks) > MAX_NAMED else "")
            said = f"no task `{name[:200]}`; there are: {listed}"
            raise Refusal(said, status=404, param="model", code="model_not_found")
        return self.tasks[name]

    async def prepared(self, make: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """What `make` returns, in a thread of its own: it may take a while, and other requests go on."""
        return await asyncio.to_thread(make)

    def submit(self, name: str, items: Sequence[Any]) -> "list[asyncio.Future[Any]]":
        """Let prepared inputs wait for their turn. Raises Refusal if there is no room. `outcome` gives the answers."""
        rows = [Row(task=name, item=item) for item in items]
        self.worker.submit(rows)
        return [asyncio.wrap_future(row.answer) for row in rows]

    async def outcome(self, name: str, answer: "asyncio.Future[Any]") -> Any:
        """An answer. Raises Refusal."""
        try:
            found = await answer
        except Refusal:
            raise
        except FlexmergeError as error:
            raise Refusal(error.message, status=500) from None
        except Exception as error:
            log.error("task `%s` failed", name, exc_info=error)
            failure = machine_failure(error)
            said = failure.message if failure is not None else f"the model failed: {type(error).__name__}"
            raise Refusal(f"task `{name}`: {said}", status=500) from None
        if isinstance(found, Choice):
            self.metrics.tokens.labels(name).inc(len(found.tokens))
        if isinstance(found, Choice) and found.finish == "cancelled":
            raise Refusal("the server is stopping", status=503, code="stopping")
        return found

    async def answers(self, name: str, items: Sequence[Any]) -> list[Any]:
        """Answers of prepared inputs, in order. Raises Refusal."""
        waited = self.submit(name, items)
        try:
            return await asyncio.gather(*(self.outcome(name, answer) for answer in waited))
        finally:
            self.cancel(name, items)

    def cancel(self, name: str, items: Sequence[Any]) -> None:
        """End what nobody waits for any more."""
        for item in items:
            self.tasks[name].cancel(item)
