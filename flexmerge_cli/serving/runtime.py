"""Holds the tasks of a bundle in one process: each stored part is placed once, and all models refer to it."""

import threading
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.bundle.mixture import Mixture
from flexmerge_cli.bundle.modules import complete
from flexmerge_cli.bundle.packed_on import packed_on
from flexmerge_cli.bundle.placeholder import (
    Placeholder,
    SharedArray,
    fill,
    made_bytes,
    named_placeholders,
    packable,
    placeholders,
)
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.view import MORE_MEMORY, View
from flexmerge_cli.engine.device import choose_device
from flexmerge_cli.engine.pool import loading
from flexmerge_cli.engine.upload import MemoryFor, Uploads, adopting, arrived
from flexmerge_cli.errors import UsageError
from flexmerge_cli.serving.batch import run_batch
from flexmerge_cli.serving.meeting import Shared, run_in_lockstep, shared_weights
from flexmerge_cli.serving.skeleton import skeleton
from flexmerge_cli.serving.weight import PackedWeight

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Key = tuple[Hashable, torch.dtype]
Run = tuple[str, Callable[[Any], Any]]
"""A task, and the function that is called with its model."""
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """One tensor that a runtime holds."""

    name: str
    """Its name in the first task that has it."""
    part: str
    """The part of a tensor that stays packed: its role, such as `codes`, and its task if it is one's own."""
    tasks: tuple[str, ...]
    device: str
    num_bytes: int


class Runtime:
    """Models of a bundle's tasks that share what the bundle shares. Thread-safe; nothing is loaded before it is used.

    Parameters are frozen, and a model's `to`, `half` and the like are refused where they would change something: they
    would copy the shared weights of one task, or break those of the others.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        tasks: Collection[str] | None = None,
        device: str = "cpu",
        weights: str = "dense",
        dtype: str | None = None,
    ) -> None:
        """Arguments and errors are those of `OpenBundle.runtime`."""
        if weights not in ("dense", "packed"):
            raise UsageError(f"weights `{weights}` is neither `dense` nor `packed`", hint="choose one of these two")
        if dtype is not None and dtype not in DTYPES:
            raise UsageError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}", hint="leave it out for the task's own")
        self.device, self._uploads = choose_device(device), Uploads()
        self._bundle, self._stays_packed = bundle, weights == "packed"
        self._dtype = None if dtype is None else DTYPES[dtype]
        self._tasks: dict[str, _Task | None] = {}
        """The open tasks; None for a task that was not requested yet."""
        self._placed: dict[Key, Tensor] = {}
        self._lock, self._lock_of_arrays = threading.RLock(), threading.Lock()
        wanted = bundle.tasks if tasks is None else tuple(tasks)
        bundle.check_tasks(wanted)
        self._tasks.update(dict.fromkeys(wanted))

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._tasks)

    @property
    def num_bytes(self) -> dict[str, int]:
        """The bytes of all tensors of all tasks by device, each once, loaded or not. Reads no weights.

        On the CPU this includes parts that lie on the bundle's mapped files.
        """
        with self._lock:
            own = sum(self._task(task).made_bytes for task in self.tasks)
            return {str(self.device): own + sum(resident.num_bytes for resident in self.describe())}

    def describe(self) -> tuple[Resident, ...]:
        """Describe every array of the bundle that the runtime holds, or will hold once its tasks are loaded."""
        found: dict[Hashable, tuple[str, SharedArray, dict[str, None]]] = {}
        with self._lock:
            for task in self.tasks:
                state = self._task(task)
                for key, held in state.needs.items():
                    mixture = state.mixtures.get(held.value.name)
                    count = held.numel() + (0 if mixture is None else mixture.num_elements)
                    whole = SharedArray(key, "", count * held.dtype.itemsize)
                    for part in held.value.parts if key in state.packed else (whole,):
                        found.setdefault(part.key, (held.value.name, part, {}))[2][task] = None
        return tuple(
            Resident(name=name, part=part.name, tasks=tuple(tasks), device=str(self.device), num_bytes=part.num_bytes)
            for name, part, tasks in found.values()
        )

    def model(self, task: str) -> Any:
        """Return the transformers model of a task, in eval mode. It is loaded when it is first asked for.

        Raises UsageError for a task that the runtime does not have, MachineError if the device has no memory left for
        it, otherwise like `OpenBundle.model`. The other tasks stay as they were.
        """
        with self._lock, torch.inference_mode(False):  # its tensors could not be used outside of inference mode
            found = self._task(task)
            if not found.is_loaded:
                try:
                    with MemoryFor(f"task `{task}`", self.device, hint=MORE_MEMORY):
                        self._load(task, found)
                except BaseException:
                    self._tasks[task] = None  # Part of the model is there: it is begun anew.
                    del found  # The error's traceback would hold it.
                    self._free()
                    raise
            return found.model

    def _load(self, task: str, found: "_Task") -> None:
        self._placed |= self._read(task, {k: v for k, v in found.needs.items() if k not in self._placed})
        with arrived(self.device):
            fill(found.model, lambda held: self._placed[held.value.key, held.dtype], self.device)
            complete(self._bundle, task, found.model, found.names, found.mixtures)
        found.is_loaded = True

    def add(self, task: str) -> None:
        """Load a task of the bundle, while others run. Reads the files of its route that were not read yet."""
        self._bundle.check_task(task)
        with self._lock:
            self._tasks.setdefault(task, None)
            self.model(task)

    def drop(self, task: str) -> None:
        """Forget a task, and free what no other one needs, as soon as nobody holds its model any more."""
        with self._lock:
            self._require(task)
            del self._tasks[task]
            self._free()

    def _free(self) -> None:
        """Let go of what no task needs."""
        needed = {key for held in self._tasks.values() if held is not None for key in held.needs}
        self._placed = {key: tensor for key, tensor in self._placed.items() if key in needed}

    def __call__(self, inputs: Mapping[str, Any], tasks: Sequence[str]) -> list[Any]:
        """Run one batch whose examples belong to different tasks.

        inputs: arguments of the models' `forward`; the first axis of every tensor is the examples. tasks: one name per
        example. Returns the output of every example, in order, its tensors without that axis: heads may have
        different sizes. Raises UsageError if `tasks` does not fit the inputs, or like `model`.
        """
        return run_batch(lambda own: self._batched(own, lambda model: model), inputs, tasks)

    def generate(self, inputs: Mapping[str, Any], tasks: Sequence[str], **options: Any) -> list[Tensor]:
        """Generate with models of several tasks in one batch. inputs, tasks and errors: as in a call.

        options: of transformers' `generate`. Returns the sequence of every example, in order. Decoders want padding on
        the left, with an attention mask.
        """
        return run_batch(
            lambda own: self._batched(own, lambda model: partial(model.generate, **options)), inputs, tasks
        )

    def run_in_lockstep(
        self, runs: Sequence[tuple[str, Callable[[Any], Result]]], joining: Callable[[], Sequence[Run]] | None = None
    ) -> list[Result]:
        """Call functions with the models of their tasks, side by side, and return the results of `runs`, in order.

        runs: (task, function of its model); a task may occur several times. Where the models share weights, products
        are taken once for all. joining: returns runs of loaded tasks that join, whenever all that run are between two
        tokens (`meeting.pause`), and whose results are dropped; it must not raise. Raises the first error once all have
        ended, or like `model`.
        """
        models = [self.model(task) for task, _ in runs]
        if joining is None and len(runs) == 1:
            with torch.inference_mode():
                return [runs[0][1](models[0])]
        adopt = adopting(self.device, own=False)

        def called(run: Callable[[Any], Result], model: Any) -> Result:
            adopt()  # Each run has a thread of its own.
            return run(model)

        calls = [partial(called, run, model) for (_, run), model in zip(runs, models)]
        if joining is None:
            return run_in_lockstep(calls, shared_weights(dict(enumerate(models))))
        running, numbers = dict(enumerate(models)), count(len(models))
        shared = shared_weights(running)

        def joined(going: Sequence[int]) -> tuple[list[Callable[[], Any]], Shared]:
            nonlocal running, shared
            more = [(next(numbers), self.model(task), run) for task, run in joining()]
            now = {number: running[number] for number in going} | {number: model for number, model, _ in more}
            if now.keys() != running.keys():
                running, shared = now, shared_weights(now)
            return [partial(called, run, model) for _, model, run in more], shared

        return run_in_lockstep(calls, shared, joined)

    def _batched(self, inputs: Mapping[str, Mapping[str, Any]], run: Callable[[Any], Callable[..., Any]]) -> list[Any]:
        def of(own: Mapping[str, Any]) -> Callable[[Any], Any]:
            return lambda model: run(model)(**own)

        return self.run_in_lockstep([(task, of(own)) for task, own in inputs.items()])

    def _task(self, task: str) -> "_Task":
        self._require(task)
        found = self._tasks[task]
        if found is None:
            with MemoryFor(f"task `{task}`", self.device, hint=MORE_MEMORY):
                found = self._tasks[task] = self._begun(task)
        return found

    def _begun(self, task: str) -> "_Task":
        with torch.inference_mode(False):
            model = skeleton(self._bundle, task, device=str(self.device), dtype=self._dtype)
        return _Task(
            model=model,
            needs=placeholders(model),
            packed=packable(model) if self._stays_packed else set(),
            made_bytes=made_bytes(model),
            names={state: held.value.names for state, held in named_placeholders(model).items()},
            mixtures=View(self._bundle, task, device=str(self.device)).mixtures,
        )

    def _read(self, task: str, needs: Mapping[Key, Placeholder]) -> dict[Key, Tensor]:
        """Read values, and digest the files meanwhile; nothing is handed out before that has ended."""
        with self._bundle.checking(task) as bundle, loading(self.device) as pool:
            view, packed = View(bundle, task, device=str(self.device)).parameters, self._task(task).packed

            def read(key: Key) -> Tensor:
                held = needs[key]
                if key not in packed:
                    return held.value.taken(view).to(held.dtype)
                stored = bundle.packed(task, view.aligned[held.value.name])
                assert stored is not None
                found = stored.packed(bundle.parts_of(task), bundle.held)
                there = (
                    found if self.device.type == "cpu" else packed_on(found, self.device, partial(self._place, task))
                )
                return PackedWeight(there, tuple(held.shape), held.dtype)

            return dict(zip(needs, pool.map(read, needs)))

    def _place(self, task: str, array: np.ndarray) -> Tensor:
        """Put an array of a packed weight on the device, once for all tasks that share it.

        Two arrays at one place in memory are the same, since each is kept as long as a task has it.
        """
        key = array.ctypes.data, array.nbytes, array.dtype.str
        with self._lock_of_arrays:
            held = [own.arrays for own in self._tasks.values() if own is not None]
            found = next((arrays[key] for arrays in held if key in arrays), None)
            if found is None:
                found = array, self._uploads(torch.from_numpy(array), self.device)
            self._task(task).arrays[key] = found
            return found[1].reshape(array.shape)

    def _require(self, task: str) -> None:
        if task not in self._tasks:
            raise UsageError(f"the runtime has no task `{task}`", hint=f"add() it; it has: {', '.join(self.tasks)}")


@dataclass(slots=True, kw_only=True)
class _Task:
    """The model of one task."""

    model: Any
    needs: dict[Key, Placeholder]
    """What it is made of."""
    packed: set[Key]
    """What of that stays packed."""
    made_bytes: int
    names: dict[str, tuple[str, ...]]
    """The own names of the tensors that each of its parameters and buffers is made of, by its name in the state."""
    mixtures: Mapping[str, Mixture]
    """The layers that are mixtures of experts, by the own name of their weight."""
    arrays: dict[tuple[int, int, str], tuple[np.ndarray, Tensor]] = field(default_factory=dict)
    """The arrays of packed weights that lie on a GPU, by where they come from: array and its copy there."""
    is_loaded: bool = False
