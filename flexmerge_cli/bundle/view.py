"""Gives a task's model out of a bundle, as a read-only mapping of tensors or as the transformers model."""

from collections.abc import Iterator, Mapping
from copy import copy as copy_of
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flexmerge_cli.bundle.decode_on import decode_on
from flexmerge_cli.bundle.mixture import Mixture
from flexmerge_cli.bundle.model import assigned_model
from flexmerge_cli.bundle.modules import complete
from flexmerge_cli.bundle.placeholder import Placeholder, Value, fill, named_placeholders, placeholders
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.engine.device import as_tensor, choose_device, torch_dtype
from flexmerge_cli.engine.pool import loading
from flexmerge_cli.engine.upload import MemoryFor, Uploads
from flexmerge_cli.errors import UsageError

MORE_MEMORY = 'drop tensors, models and tasks that nobody uses; runtime(weights="packed", dtype="bf16") takes the least'


class View(Mapping[str, Tensor]):
    """A mapping from own names to the tensors of one task.

    Where the group is dense the tensor lies on the mapped file and two tasks of one group have the same storage: what
    is written to it both see (the file is not changed). copy=True gives each tensor memory of its own. Where something
    must be decoded, every look-up decodes afresh. On another device than the CPU every tensor is a copy, and what is
    coded in few bits goes there packed and is decoded there, to the same bits.

    A file's digest is compared before the first tensor comes out of it, unless the bundle was opened with
    verify="off". From the second look-up on, the other files of the task are digested meanwhile. The files stay open:
    a bundle that is replaced or removed meanwhile is read on as it was. If the disk fails, a look-up raises
    MachineError where it reads; a tensor on the mapped file cannot: the process gets SIGBUS if it touches a page that
    is in memory no more, and so does a look-up that copies from it to another device. copy=True excludes that. Raises
    MachineError where the device has no memory left.
    """

    def __init__(self, bundle: Bundle, task: str, *, copy: bool = False, device: str = "cpu") -> None:
        bundle.hold(task)
        self.bundle, self.task, self.copy = bundle, task, copy
        self.device, self._uploads = choose_device(device), Uploads()
        self._tensors = bundle.tensors_of(task)
        self._looked_up = 0
        self.aligned = bundle.manifest.aligned(task)
        self._gives_centres = False

    @property
    def parameters(self) -> "View":
        """The same mapping, with the centre as the weight of each layer that is a mixture of experts."""
        found = copy_of(self)
        found._gives_centres = True
        return found

    @cached_property
    def mixtures(self) -> "dict[str, Mixture]":
        """The mixtures of experts among the layers, by the own name of their weight."""
        found = self.bundle.experts(self.task)
        return {
            own: Mixture(found[name], self.bundle, self.device, self._uploads, self.bundle.identity(self.task, name))
            for own, name in self.aligned.items()
            if name in found
        }

    def __getitem__(self, name: str) -> Tensor:
        aligned = self.aligned[name]
        self._looked_up += 1
        if self._looked_up == 2:  # whoever wants one tensor alone does not have the other files read
            self.bundle.ahead(self.task)
        with MemoryFor(f"`{name}` of task `{self.task}`", self.device, hint=MORE_MEMORY):
            if self._gives_centres and name in self.mixtures:
                return self.mixtures[name].centre
            return self._tensor(name, aligned)

    def _tensor(self, name: str, aligned: str) -> Tensor:
        dtype, shape = self._tensors[name]
        stored = None if self.device.type == "cpu" else self.bundle.whole(self.task, aligned).packable
        if stored is not None and stored.decodes_on_devices:
            read, parts = self.bundle.bits if self.copy else self.bundle.held, self.bundle.parts_of(self.task)
            return decode_on(parts, read, stored, self.device, self._uploads).reshape(shape)
        array = self.bundle.array(self.task, aligned, shared=not self.copy)
        tensor = as_tensor(np.ascontiguousarray(array).reshape(-1).view(np.uint8), dtype).reshape(shape)
        return self._uploads(tensor, self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@torch.inference_mode(False)  # its tensors could not be trained, or used outside of inference mode
def load_model(view: View, **kwargs: Any) -> Any:
    """Load the transformers model of the task's config. Its parameters are the view's tensors, without a second copy.

    Parameters that models of the group have in common are frozen: those on a mapped file, and what the loader joins of
    such ones, as the experts of a mixture, which lies in memory once while a model has it. kwargs go to the model's
    `from_pretrained`. Raises like task_model, and IntegrityError if a file of the task is not the manifest's.
    """
    bundle, task = view.bundle, view.task
    maps = view.device.type == "cpu" and not view.copy
    forms = {own: (torch_dtype(dtype), shape) for own, (dtype, shape) in bundle.tensors_of(task).items()}
    weights = {
        own: Placeholder(Value(bundle.identity(task, view.aligned[own]), own, view), shape, dtype)
        for own, (dtype, shape) in forms.items()
    }
    model = task_model(bundle, task, weights, **kwargs)

    def placed(held: Placeholder, tensors: View) -> nn.Parameter:
        names, key = held.value.names, (held.value.key, held.dtype)
        is_joined = held.value.made is not None
        is_shared = maps and all(name in mixtures or bundle.is_shared(task, view.aligned[name]) for name in names)
        is_shared = is_shared and (is_joined or held.dtype == forms[names[0]][0])
        there: nn.Parameter | None = bundle.joined.get(key) if is_joined and is_shared else None
        if there is not None:
            return there
        tensor = held.value.taken(tensors).to(held.dtype)
        made = nn.Parameter(tensor, requires_grad=tensor.is_floating_point() and not is_shared)
        if is_joined and is_shared:
            bundle.joined[key] = made
        return made

    needs, states, mixtures = placeholders(model), named_placeholders(model), view.mixtures
    with (
        MemoryFor(f"task `{task}`", view.device, hint=MORE_MEMORY),
        bundle.checking(task) as checked,
        loading(view.device) as pool,
    ):
        checked.ahead(task)
        tensors = View(checked, task, copy=view.copy, device=str(view.device)).parameters
        found = dict(zip(needs, pool.map(lambda held: placed(held, tensors), needs.values())))
        fill(model, lambda held: found[held.value.key, held.dtype])
        names = {state: held.value.names for state, held in states.items()}
        complete(bundle, task, model, names, tensors.mixtures)
    return model


def task_model(bundle: Bundle, task: str, weights: Mapping[str, Tensor], **kwargs: Any) -> Any:
    """Return the transformers model of a task's config, in eval mode, with these weights under the task's own names.

    kwargs go to the model's `from_pretrained`. Raises UsageError without transformers or config, DataError if the
    names of model and checkpoint differ, IntegrityError if a side file is not the manifest's or the bundle is replaced.
    """
    folder = bundle.config_folder(task)
    if (why := bundle.manifest.tasks[task].why_no_model) is not None:
        hint = f"flexmerge export {bundle.path} --task {task} -o FOLDER, and load it with peft"
        raise UsageError(f"task `{task}` {why}", hint=hint)
    bundle.check_files(task, weights=False)
    built = assigned_model(weights, folder, otherwise="use bundle.view and your own code", **kwargs)
    bundle.check_files(task, weights=False)  # transformers reads side files by their paths
    # A model without a head, where the config names none, has no use for one that the task has.
    built.require("missing", "of another shape", who=f"the weights of task `{task}`", hint="check its config.json")
    return built.model
