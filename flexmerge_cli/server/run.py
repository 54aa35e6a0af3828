"""Runs a server for a bundle that answers on a socket until it is asked to stop. Raises; prints nothing."""

import asyncio
import errno
import math
import signal
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.errors import MachineError, UsageError
from flexmerge_cli.server.app import STOP_SECONDS, make_app
from flexmerge_cli.server.kinds import tasks_of
from flexmerge_cli.server.metrics import Metrics
from flexmerge_cli.server.service import Service
from flexmerge_cli.server.worker import BatchWorker
from flexmerge_cli.serving.runtime import Runtime

BACKLOG = 2048
"""Connections that may wait to be accepted; uvicorn's own default."""
GRACE_SECONDS = 30.0
"""How long requests may continue after the server was asked to stop. After that they end with an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The settings of a server, apart from the bundle."""

    tasks: Collection[str] | None = None
    """None means all."""
    weights: str = "dense"
    device: str = "cpu"
    max_memory: int | None = None
    """The most bytes that the weights of all tasks may take."""
    max_batch: int = 32
    """The most inputs that are computed at once."""
    max_wait: float = 0.005
    """Seconds that an incomplete batch waits for more inputs."""
    max_queue: int = 1024
    """The most inputs that may wait."""
    max_tokens: int = 1024
    """The most tokens of a generated text."""
    max_body: int = 16 << 20
    """The most bytes of a request."""


def make_service(bundle: Bundle, settings: ServerSettings) -> Service:
    """Load every task. Raises like `Runtime.model`, and UsageError for a task that can't be served."""
    runtime = Runtime(bundle, tasks=settings.tasks, device=settings.device, weights=settings.weights)
    tasks = tasks_of(bundle, runtime.tasks, max_tokens=settings.max_tokens)
    needed = sum(runtime.num_bytes.values())
    if settings.max_memory is not None and needed > settings.max_memory:
        fewer = "" if settings.weights == "packed" else ", or --weights packed"
        raise UsageError(
            f"--max-memory {settings.max_memory} bytes is too little: the weights of {len(runtime.tasks)} tasks take "
            f"{needed} bytes",
            hint=f"--max-memory {needed}B, or fewer tasks with --tasks{fewer}",
        )
    for name in runtime.tasks:
        tasks[name].meet(runtime.model(name))
    metrics = Metrics()
    worker = BatchWorker(
        runtime,
        tasks,
        max_batch=settings.max_batch,
        max_wait=settings.max_wait,
        max_queue=settings.max_queue,
        on_batch=metrics.count_batch,
    )
    metrics.watch(runtime.num_bytes, lambda: worker.num_waiting)
    return Service(tasks=tasks, worker=worker, metrics=metrics, max_body=settings.max_body)


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, on which nothing listens yet. port: 0 chooses a free one.

    Raises UsageError for a host that does not exist, MachineError for a port that is in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--host {host}: {said}", hint="--host 127.0.0.1, or --host 0.0.0.0 for all") from None
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        is_taken = error.errno == errno.EADDRINUSE
        said = "another program listens on this port" if is_taken else error.strerror
        hint = "choose another one with --port, or --port 0 for one that is free"
        if not is_taken:
            hint = "choose another address with --host, or another port with --port"
        raise MachineError(f"{host}:{port}: {said}", hint=hint) from None
    return found


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(service: Service, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    """Answer requests until a signal arrives, then finish running requests and return.

    on_ready: called once requests are answered.
    """
    config = uvicorn.Config(
        make_app(service),
        log_config=None,  # Its own would close the handlers of all other libraries in this process.
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(GRACE_SECONDS + STOP_SECONDS),
        server_header=False,
        ws="none",
    )
    _Server(config, on_ready, partial(service.worker.stop, STOP_SECONDS)).run(sockets=[listener])


class _Server(uvicorn.Server):
    """A server for which a signal to stop is an ordinary end, not one to raise again afterwards."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], stop: Callable[[], object]) -> None:
        """Prepare a server. stop: ends all computations, so that running answers and streams end with an error."""
        super().__init__(config)
        self._on_ready, self._stop = on_ready, stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.create_task(self._stop_late())
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    async def _stop_late(self) -> None:
        await asyncio.sleep(GRACE_SECONDS)
        await asyncio.to_thread(self._stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before: dict[signal.Signals, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
