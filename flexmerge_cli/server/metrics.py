"""Counts what the server does, in the text format of Prometheus. Names that clients make up are never labels."""

import time
from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexmerge_cli.server.worker import Row

COUNTS = tuple(2**power for power in range(11))


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter(
            "flexmerge_requests", "Requests, by route and status.", ["route", "status"], registry=own
        )
        self.running = Gauge(
            "flexmerge_requests_in_progress", "Requests that are not answered to their end.", registry=own
        )
        self.seconds = Histogram(
            "flexmerge_request_seconds", "From a request to the end of its answer.", ["route"], registry=own
        )
        self.inputs = Counter("flexmerge_inputs", "Inputs that were computed, by task.", ["task"], registry=own)
        self.batch_inputs = Histogram("flexmerge_batch_inputs", "Inputs of a batch.", buckets=COUNTS, registry=own)
        self.batch_tasks = Histogram("flexmerge_batch_tasks", "Tasks of a batch.", buckets=COUNTS, registry=own)
        self.tokens = Counter("flexmerge_generated_tokens", "Tokens generated, by task.", ["task"], registry=own)
        self.waiting = Gauge("flexmerge_waiting_inputs", "Inputs that wait for their turn.", registry=own)
        self.resident = Gauge("flexmerge_resident_bytes", "Tensors of all tasks, each once.", ["device"], registry=own)
        ProcessCollector(registry=own)

    def watch(self, num_bytes: Mapping[str, int], num_waiting: Callable[[], int]) -> None:
        """Observe memory and queue. num_bytes: a runtime's bytes, by device."""
        for device, count in num_bytes.items():
            self.resident.labels(device).set(count)
        self.waiting.set_function(num_waiting)

    def count_batch(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.inputs.labels(row.task).inc()
        self.batch_inputs.observe(len(rows))
        self.batch_tasks.observe(len({row.task for row in rows}))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class MeasuredApp:
    """Counts every request, those in progress, and their seconds. An ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun = 500, time.perf_counter()

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.running.inc()
        try:
            await self._app(scope, receive, seen)
        finally:
            self._metrics.running.dec()
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - begun)
