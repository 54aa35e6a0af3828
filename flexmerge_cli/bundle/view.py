"""A task's model out of a bundle: a read-only mapping of tensors, or the transformers model."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from flexmerge_cli.bundle.decode_on import decode_on
from flexmerge_cli.bundle.model import assigned_model
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.engine.device import as_tensor, choose_device
from flexmerge_cli.errors import UsageError


class View(Mapping[str, Tensor]):
    """Own name -> tensor of one task.

    Where the group is dense the tensor lies on the mapped file and two tasks of one group have the same storage: what
    is written to it both see (the file is not changed). copy=True gives each tensor memory of its own. Where something
    must be decoded, every look-up decodes afresh. On another device than the CPU every tensor is a copy, and what is
    coded in few bits goes there packed and is decoded there, to the same bits.
    """

    def __init__(self, bundle: Bundle, task: str, *, copy: bool = False, device: str = "cpu") -> None:
        bundle.check_task(task)
        self.bundle, self.task, self.copy = bundle, task, copy
        self.device = choose_device(device)
        self._tensors = bundle.tensors_of(task)
        own = bundle.manifest.tasks[task].names
        self._aligned = {own.get(t.name, t.name): t.name for t in bundle.manifest.tensors if task in t.digests}

    def __getitem__(self, name: str) -> Tensor:
        aligned = self._aligned[name]
        if self.device.type != "cpu":
            coded = self.bundle.coded(self.task, aligned)
            if coded is None:
                return View(self.bundle, self.task)[name].to(self.device)
            return decode_on(coded, self.bundle.part_bits(self.task), self.device).reshape(self._tensors[name][1])
        array = self.bundle.array(self.task, aligned)
        if self.copy and self.bundle.is_shared(self.task, aligned):
            array = array.copy()
        dtype, shape = self._tensors[name]
        return as_tensor(np.ascontiguousarray(array).reshape(-1).view(np.uint8), dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load_model(view: View, **kwargs: Any) -> Any:
    """The transformers model of the task's config, its parameters assigned from the view, without a second copy.

    kwargs go to the model's `from_pretrained`. Raises UsageError without transformers or config, DataError if names of
    model and checkpoint differ.
    """
    folder = view.bundle.config_folder(view.task)
    if view.bundle.manifest.tasks[view.task].pooled is not None:
        hint = f"flexmerge export {view.bundle.path} --task {view.task} -o FOLDER, and load it with peft"
        raise UsageError(f"task `{view.task}` is an adapter of a pool, and no model", hint=hint)
    built = assigned_model(view, folder, otherwise="use bundle.view and your own code", **kwargs)
    # A model without a head, where the config names none, has no use for one that the task has.
    built.require("missing", "of another shape", who=f"the weights of task `{view.task}`", hint="check its config.json")
    return built.model
