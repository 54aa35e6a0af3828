"""A task's model out of a bundle: a read-only mapping of tensors, or the transformers model."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.bundle.decode_on import decode_on
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.dtypes import TO_TORCH
from flexmerge_cli.engine.device import choose_device
from flexmerge_cli.errors import DataError, UsageError


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
        if array.size == 0:  # numpy gives an empty range no stride that torch would view
            return torch.empty(shape, dtype=getattr(torch, TO_TORCH[dtype]))
        flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return flat.view(getattr(torch, TO_TORCH[dtype])).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def load_model(view: View, **kwargs: Any) -> Any:
    """The transformers model of the task's config, its parameters assigned from the view, without a second copy.

    kwargs go to the model's `from_pretrained`. Raises UsageError without transformers or config, DataError if names of
    model and checkpoint differ.
    """
    try:
        import transformers
    except ImportError:
        raise UsageError("transformers is not installed", hint="pip install 'flexmerge-cli[eval]'") from None
    folder = view.bundle.config_folder(view.task)
    if view.bundle.manifest.tasks[view.task].pooled is not None:
        hint = f"flexmerge export {view.bundle.path} --task {view.task} -o FOLDER, and load it with peft"
        raise UsageError(f"task `{view.task}` is an adapter of a pool, and no model", hint=hint)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"task `{view.task}` has no config.json in the bundle", hint="use bundle.view and your own code"
        )
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if model_class is None:
        raise UsageError(f"transformers has no `{names[0]}`", hint="use bundle.view and your own code")
    # Documented so: without a path, the weights are those of `state_dict`.
    load: Any = model_class.from_pretrained
    model, info = load(None, config=config, state_dict=dict(view), output_loading_info=True, **kwargs)
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)}
    if wrong.get("missing_keys") or wrong.get("mismatched_keys"):
        raise DataError(
            f"task `{view.task}` does not fit {model_class.__name__}: {wrong}", hint="check its config.json"
        )
    return model.eval()
