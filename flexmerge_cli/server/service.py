"""Holds what the routes of the server share: the tasks, the worker, and the limits."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from flexmerge_cli.errors import FlexmergeError, machine_failure
from flexmerge_cli.server.generation import Choice
from flexmerge_cli.server.metrics import Metrics
from flexmerge_cli.server.refusal import CLIENT_GONE, Refusal
from flexmerge_cli.server.tasks import Task
from flexmerge_cli.server.worker import BatchWorker, Row

log = logging.getLogger("uvicorn.error")
MAX_NAMED = 50
"""The most tasks that an error names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The tasks of a runtime, ready for requests."""

    tasks: dict[str, Task]
    worker: BatchWorker
    metrics: Metrics
    max_body: int
    """The most bytes of a request."""

    def task(self, name: str) -> Task:
        """Return a task. Raises Refusal if it is not served."""
        if name not in self.tasks:
            listed = ", ".join(list(self.tasks)[:MAX_NAMED]) + (", …" if len(self.tasks) > MAX_NAMED else "")
            said = f"no task `{name[:200]}`; there are: {listed}"
            raise Refusal(said, status=404, param="model", code="model_not_found")
        return self.tasks[name]

    async def prepared(self, make: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """Return what `make` returns. It runs in its own thread: it may take a while, and other requests continue."""
        return await asyncio.to_thread(make)

    def submit(self, name: str, items: Sequence[Any]) -> "list[asyncio.Future[Any]]":
        """Queue prepared inputs. Raises Refusal if there is no room. `outcome` gives the answers."""
        rows = [Row(task=name, item=item) for item in items]
        self.worker.submit(rows)
        return [_seen(asyncio.wrap_future(row.answer)) for row in rows]

    async def outcome(self, name: str, answer: "asyncio.Future[Any]") -> Any:
        """Wait for an answer. Raises Refusal."""
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

    async def answers(self, name: str, items: Sequence[Any], receive: Receive) -> list[Any]:
        """Answer prepared inputs, in order. Raises Refusal, also if the client disconnects first.

        receive: the function of a request whose body has been read.
        """
        outcomes = [self.outcome(name, answer) for answer in self.submit(name, items)]
        answers: asyncio.Future[list[Any]] = _seen(asyncio.gather(*outcomes))
        gone: asyncio.Future[Any] = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({answers, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise Refusal("the client went away", status=CLIENT_GONE)
            return answers.result()
        finally:
            gone.cancel()
            answers.cancel()  # inputs that still wait are not computed
            self.cancel(name, items)

    def cancel(self, name: str, items: Sequence[Any]) -> None:
        """End generation that nobody waits for any more."""
        for item in items:
            self.tasks[name].cancel(item)


def _seen(answer: "asyncio.Future[Any]") -> "asyncio.Future[Any]":
    """Return the answer. asyncio logs no error of it, which nobody awaits once a client is gone or has an error."""
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())
    return answer


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
