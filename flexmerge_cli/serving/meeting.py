"""Runs the models of several tasks side by side. Where they share a weight, its product is taken once for all.

Every task's model runs its own code on its own rows, in a thread of its own, one thread at a time: so any architecture,
its caches and `generate` included, computes what it computes alone. A linear layer whose weight, or centre, several of
the tasks have in common waits until every other thread waits too or has ended; then the weights for which all wait that
have them are multiplied by the rows of all together, and each goes on with its own. Between two tokens of a text, where
a run says `pause`, others may join: then all begin their next pass through the layers together. Knows neither bundles
nor tasks.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flexmerge_cli.serving.weight import FEW_ROWS, PackedWeight, split_product

Result = TypeVar("Result")

Product = Callable[[Tensor], Tensor]
"""Rows [k, n] -> [k, m]."""


Shared = Mapping[int, set[int]]
"""Where a weight lies -> the numbers of the runs that have it, two or more."""


def shared_weights(models: Mapping[int, nn.Module]) -> Shared:
    """Return the weights, or centres of packed weights, that the models of several runs have in common.

    models: by the number of the run.
    """
    found: dict[int, set[int]] = {}
    for number, model in models.items():
        for held in model.parameters():
            if (place := _place(held)) is not None:
                found.setdefault(place, set()).add(number)
    return {place: numbers for place, numbers in found.items() if len(numbers) > 1}


Joining = Callable[[Sequence[int]], tuple[Sequence[Callable[[], Any]], Shared]]
"""Called between tokens with the numbers of the runs that go on. Returns the runs that join, which get the next
numbers and whose results are dropped, and `shared_weights` of all that then run. It must not raise."""


def run_in_lockstep(
    runs: Sequence[Callable[[], Result]], shared: Shared, joining: Joining | None = None
) -> list[Result]:
    """Return the results of `runs`, in order. The first error, in order of the numbers, is raised once all have ended.

    shared: of `shared_weights`. Runs without gradients.
    """
    meeting = _Meeting(runs, shared, joining)
    while meeting.threads:  # Others are added only by threads that have not ended.
        meeting.threads.popleft().join()
    if meeting.error is not None:
        raise meeting.error[1]
    return meeting.results


def pause() -> None:
    """Let other runs join, between two tokens. Outside of a meeting this does nothing."""
    here: tuple[_Meeting, int] | None = getattr(_attending, "here", None)
    if here is not None:
        here[0].pause(here[1])


_attending = threading.local()


class _Meeting:
    """Tracks who runs, who waits for which product, and what each has found.

    One thread runs at a time, so that it needs no lock. It keeps nothing of runs that have joined and ended, since
    others may join without end.
    """

    def __init__(self, runs: Sequence[Callable[[], Any]], shared: Shared, joining: Joining | None) -> None:
        self.results: list[Any] = [None] * len(runs)
        self.error: tuple[int, BaseException] | None = None
        """The number of the first run that failed, and its error."""
        self.threads: deque[threading.Thread] = deque()
        """Those that `run_in_lockstep` has not joined yet."""
        self._shared, self._joining = shared, joining
        self._places = count()
        self._turns: dict[int, threading.Semaphore] = {}
        self._ready: list[int] = []
        """The runs that may go on, in order."""
        self._waiting: dict[int, tuple[int, Hashable, Tensor, Product]] = {}
        """What each run waits for: where the weight lies, a key of the product, its rows, and the product."""
        self._paused: set[int] = set()
        self._found: dict[int, Tensor | BaseException] = {}
        self._multiplies = False
        """Whether a thread is taking a product for all, which its own mode must not intercept."""
        for run in runs:
            self._add(run)
        self._next()

    def _add(self, run: Callable[[], Any]) -> None:
        place = next(self._places)
        self._turns[place] = threading.Semaphore(0)
        self._ready.append(place)
        thread = threading.Thread(target=self._attend, args=(place, run), daemon=True)
        thread.start()
        self.threads.append(thread)  # which must have started, as it may be joined at once

    def _attend(self, place: int, run: Callable[[], Any]) -> None:
        torch.get_num_threads()  # takes over what was set; without it a thread uses all cores
        _attending.here = self, place
        self._turns[place].acquire()
        try:
            with torch.inference_mode(), _Mode(self, place):
                result = run()
            if place < len(self.results):
                self.results[place] = result
        except BaseException as error:  # raised by run_in_lockstep
            if self.error is None or place < self.error[0]:
                self.error = place, error
        del self._turns[place]
        self._next()

    def pause(self, place: int) -> None:
        if self._joining is not None:
            self._paused.add(place)
            self._next()
            self._turns[place].acquire()

    def linear(self, place: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        """Multiply by a shared weight. Returns NotImplemented where nothing is shared."""
        if self._multiplies:
            return NotImplemented
        rows = x.reshape(-1, x.shape[-1])
        if isinstance(weight, PackedWeight):
            address = _place(weight)
            if address is None or address not in self._shared:
                return NotImplemented
            if len(rows) > FEW_ROWS or not weight.packed.has_product:
                return NotImplemented
            centre, residual = weight.halves()
            found = self._product(place, address, (), rows.float(), lambda x: functional.linear(x, centre))
            found = found if residual is None else found + split_product(rows, residual)
            found = (found if bias is None else found + bias).to(x.dtype)
        elif weight.data_ptr() in self._shared:
            key = _taken_as(weight, bias)
            found = self._product(place, weight.data_ptr(), key, rows, lambda x: functional.linear(x, weight, bias))
        else:
            return NotImplemented
        return found.reshape(*x.shape[:-1], found.shape[1])

    def addmm(self, place: int, bias: Tensor, x: Tensor, weight: Tensor) -> Any:
        """Multiply as transformers' Conv1D calls it."""
        if self._multiplies or isinstance(weight, PackedWeight) or weight.data_ptr() not in self._shared:
            return NotImplemented
        key = _taken_as(weight, bias)
        return self._product(place, weight.data_ptr(), key, x, lambda x: torch.addmm(bias, x, weight))

    def _product(self, place: int, weight: int, key: Hashable, x: Tensor, product: Product) -> Tensor:
        """Return product(x), taken together with those of the other runs that have this weight and key."""
        self._waiting[place] = weight, (weight, key, x.dtype), x, product
        self._next()
        self._turns[place].acquire()
        found = self._found.pop(place)
        if isinstance(found, BaseException):
            raise found
        return found

    def _next(self) -> None:
        """Let the next run go on. If all wait, take products first; if all have paused, let others join."""
        if not self._ready and self._waiting:
            self._multiply()
        if not self._ready and self._paused:
            self._ready = sorted(self._paused)
            self._paused.clear()
            assert self._joining is not None
            runs, self._shared = self._joining(self._ready)
            for run in runs:
                self._add(run)
        if self._ready:
            self._turns[self._ready.pop(0)].release()

    def _multiply(self) -> None:
        """Take the products for which all wait that have the weight.

        A run with a weight of its own passes it without waiting, and so gets ahead of the others: it waits then for a
        weight to which those that share it are yet to come. If no weight has all, as where they take different ways
        through their layers, the products of all that wait are taken.
        """
        self._multiplies = True
        by_weight: dict[int, set[int]] = {}
        for place, (weight, _, _, _) in self._waiting.items():
            by_weight.setdefault(weight, set()).add(place)
        going = self._turns.keys() - self._paused
        whole = {weight for weight, places in by_weight.items() if self._shared.get(weight, set()) & going <= places}
        by_key: dict[Hashable, list[int]] = {}
        for place, (weight, key, _, _) in sorted(self._waiting.items()):
            if weight in whole or not whole:
                by_key.setdefault(key, []).append(place)
        for places in by_key.values():
            rows, product = [self._waiting[place][2] for place in places], self._waiting[places[0]][3]
            try:
                with torch.inference_mode():
                    found = product(torch.cat(rows) if len(rows) > 1 else rows[0])
                self._found.update(zip(places, torch.split(found, [len(x) for x in rows])))
            except Exception as error:  # each of those that wait for it raises it
                self._found.update(dict.fromkeys(places, error))
        self._multiplies = False
        self._ready = sorted(place for places in by_key.values() for place in places)
        for place in self._ready:
            del self._waiting[place]


class _Mode(TorchFunctionMode):
    """Intercepts the products of one thread."""

    def __init__(self, meeting: _Meeting, place: int) -> None:
        super().__init__()
        self._meeting, self._place = meeting, place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = NotImplemented
        if func is functional.linear:
            found = self._meeting.linear(self._place, *args, **(kwargs or {}))
        elif func is torch.addmm and not kwargs:
            found = self._meeting.addmm(self._place, *args)
        return func(*args, **(kwargs or {})) if found is NotImplemented else found


def _taken_as(weight: Tensor, bias: Tensor | None) -> Hashable:
    """Return what tells a weight from its own slice or transpose, which begin at its place, and how it is biased."""
    return weight.shape, weight.stride(), None if bias is None else bias.data_ptr()


def _place(weight: Tensor) -> int | None:
    """Return where a weight, or its centre, lies; None if it is no matrix."""
    if not isinstance(weight, PackedWeight):
        return weight.data_ptr() if weight.dim() == 2 else None
    return weight.packed.address
