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

    A file's sha256 is compared before the first tensor comes out of it, unless the bundle was opened with
    verify="off". The files stay open: a bundle that is replaced or removed meanwhile is read on as it was. If the disk
    fails, a look-up raises MachineError where it reads; a tensor on the mapped file cannot: the process gets SIGBUS
    if it touches a page that is in memory no more. copy=True excludes that.
    """

    def __init__(self, bundle: Bundle, task: str, *, copy: bool = False, device: str = "cpu") -> None:
        bundle.hold(task)
        self.bundle, self.task, self.copy = bundle, task, copy
        self.device = choose_device(device)
        self._tensors = bundle.tensors_of(task)
        own = bundle.manifest.tasks[task].names
        self._aligned = {own.get(t.name, t.name): t.name for t in bundle.manifest.tensors if task in t.digests}

    def __getitem__(self, name: str) -> Tensor:
        aligned = self._aligned[name]
        dtype, shape = self._tensors[name]
        on_cpu = self.device.type == "cpu"
        coded = None if on_cpu else self.bundle.coded(self.task, aligned)
        if coded is not None:
            return decode_on(self.bundle, coded, self.device).reshape(shape)
        array = self.bundle.array(self.task, aligned, shared=on_cpu and not self.copy)
        tensor = as_tensor(np.ascontiguousarray(array).reshape(-1).view(np.uint8), dtype).reshape(shape)
        return tensor if on_cpu else tensor.to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load_model(view: View, **kwargs: Any) -> Any:
    """The transformers model of the task's config, its parameters assigned from the view, without a second copy.

    kwargs go to the model's `from_pretrained`. Raises UsageError without transformers or config, DataError if names of
    model and checkpoint differ, IntegrityError if a file of the task is not the manifest's, or the bundle is replaced
    meanwhile.
    """
    folder = view.bundle.config_folder(view.task)
    if view.bundle.manifest.tasks[view.task].pooled is not None:
        hint = f"flexmerge export {view.bundle.path} --task {view.task} -o FOLDER, and load it with peft"
        raise UsageError(f"task `{view.task}` is an adapter of a pool, and no model", hint=hint)
    view.bundle.check_files(view.task)
    built = assigned_model(view, folder, otherwise="use bundle.view and your own code", **kwargs)
    view.bundle.check_files(view.task)  # transformers reads side files by their paths
    # A model without a head, where the config names none, has no use for one that the task has.
    built.require("missing", "of another shape", who=f"the weights of task `{view.task}`", hint="check its config.json")
    return built.model
