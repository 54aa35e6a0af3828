"""Exports a bundle whose tasks differ by low-rank matrices as one base folder and a PEFT adapter per task.

Engines that serve many fine-tunes of one base hold it once and read such adapters. Kept adapters are given back as they
are; so are tasks that are no models, whose base is not in the bundle. Low-rank residuals of full fine-tunes become
adapters of the centre: B and A are the stored factors, padded with zeros to one rank, so that each module's scale is 1.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flexmerge_cli.bundle.export import check_place, copy_file, export_task, side_files, write_weights
from flexmerge_cli.bundle.exported import exported_files
from flexmerge_cli.bundle.publish import publish
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.dtypes import NUMPY
from flexmerge_cli.checkpoint.libraries import LIBRARIES
from flexmerge_cli.checkpoint.peft import CONFIG_NAME
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import UsageError
from flexmerge_cli.family.factors import factor_pairs
from flexmerge_cli.formats.manifest import Manifest

BASE, ADAPTERS = "base", "adapters"
HINT = "leave out --as-lora: `export --all` writes a whole checkpoint of each task"
FAN_IN_FIRST = "Conv1D"
LINEAR = ("Linear", FAN_IN_FIRST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factored:
    """The tasks of a bundle as one shared centre and low-rank factors of each task."""

    centres: Mapping[str, StoredTensor]
    """Aligned name -> the part that all tasks add to."""
    factors: Mapping[str, Mapping[str, tuple[StoredTensor, StoredTensor]]]
    """Task -> aligned name -> left [m, r] and right [r, n]. Kept adapters have theirs in their own files."""
    rank: int
    """The largest."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Aligned name -> name in the base folder, where they differ."""


def factored(bundle: Bundle) -> Factored:
    """Find the factors. Raises UsageError that names the first tensor that is not low rank over what the tasks
    share."""
    for task in bundle.tasks:
        bundle.require_tensors(task)
    for split in bundle.manifest.splits:
        raise _refused(split.tensor, bundle.tasks[0], "is stored in parts")
    centres: dict[str, StoredTensor] = {}
    factors: dict[str, dict[str, tuple[StoredTensor, StoredTensor]]] = {task: {} for task in bundle.tasks}
    rank = 0
    for tensor in bundle.manifest.tensors:
        for task in tensor.digests if tensor.of is None else ():
            found = bundle.whole(task, tensor.name).low_rank_sum(bundle.parts_of(task))
            if found is None:
                raise _refused(tensor.name, task, "does not differ by a matrix of low rank")
            if found.factors is not None and len(tensor.shape_of(task)) != 2:
                raise _refused(tensor.name, task, "is no matrix")
            centre, own, rank = found.centre, found.factors, max(rank, found.rank)
            first = centres.setdefault(tensor.name, centre)
            if not _same(bundle, first, centre):
                raise _refused(tensor.name, task, "does not differ by a matrix of low rank from that of other tasks")
            if own is not None:
                factors[task][tensor.name] = own
    kept = bundle.manifest.kept
    names = {} if kept else bundle.manifest.tasks[bundle.tasks[0]].names
    return Factored(centres=centres, factors=factors, rank=rank, names=names)


def _refused(tensor: str, task: str, why: str) -> UsageError:
    return UsageError(f"`{tensor}` of task `{task}` {why}: it cannot be served as a LoRA", hint=HINT)


def _same(bundle: Bundle, one: StoredTensor, other: StoredTensor) -> bool:
    if (one.path, one.offset) == (other.path, other.offset):
        return True
    if (one.dtype, one.num_elements) != (other.dtype, other.num_elements):
        return False
    return bool(np.array_equal(bundle.bits(one).view(np.uint8), bundle.bits(other).view(np.uint8)))


def export_as_lora(bundle: Bundle, target: Path, *, force: bool = False) -> dict[str, list[str]]:
    """Write `base` and `adapters/TASK` into a folder, which appears whole or not at all.

    Returns engine -> the lines that serve them. Raises UsageError as `factored`, and for modules that no LoRA fits.
    """
    for task in bundle.tasks:
        bundle.check_task(task)
    entry, whole = bundle.manifest.tasks[bundle.tasks[0]], None
    if entry.why_no_lora is not None:
        first = bundle.manifest.tensors[0]
        raise _refused(first.name, next(iter(first.digests)), entry.why_no_lora)
    if entry.why_no_model is not None:
        shapes = {tensor.name: tensor.shape for tensor in bundle.manifest.tensors}
        rank = max((shapes[a][0] for a, _ in factor_pairs(shapes)), default=1)
    else:
        whole = factored(bundle)
        whole = replace(whole, rank=max(1, whole.rank))  # no library takes an adapter of rank 0
        rank = whole.rank
    needed = 0 if whole is None else sum(part.num_bytes for part in whole.centres.values())
    ours = partial(_exported, bundle.manifest)
    check_place(bundle, target, needed, force=force, ours=ours)
    with publish(target, force=force, ours=ours, needed_bytes=needed) as folder:
        (folder / ADAPTERS).mkdir()
        if whole is not None:
            (folder / BASE).mkdir()
            _write_base(bundle, whole, folder / BASE)
        has_own = not all(task.is_kept for task in bundle.manifest.tasks.values())
        kinds = _modules(folder / BASE) if whole is not None and has_own else {}
        for task in bundle.tasks:
            bundle.check_files(task)
            if whole is None or bundle.manifest.tasks[task].is_kept:
                export_task(bundle, task, folder / ADAPTERS / task)
            else:
                (folder / ADAPTERS / task).mkdir()
                _write_adapter(bundle, task, whole, kinds, folder / ADAPTERS / task)
    return _commands(target, bundle.tasks, rank, has_base=whole is not None)


def _write_base(bundle: Bundle, whole: Factored, folder: Path) -> None:
    if bundle.manifest.kept:
        beside = {path: name for name, path in bundle.manifest.base_files.items() if "safetensors" not in name}
    else:
        beside = side_files(bundle, bundle.tasks[0], merged=False)
    for path, name in beside.items():
        if name != "README.md":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(bundle, path, folder / name)
    parts = {whole.names.get(name, name): part for name, part in whole.centres.items()}
    forms = {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
    write_weights(
        folder, LIBRARIES["transformers"].stem, forms, lambda name: bundle.bits(parts[name]), bundle.manifest.id
    )


def _write_adapter(
    bundle: Bundle, task: str, whole: Factored, kinds: Mapping[str, tuple[str, str]], folder: Path
) -> None:
    """Write one adapter. All have the same modules, with zeros where a task has no factors: PEFT requires every
    module. If no task has factors, they have one linear layer."""
    changed = sorted({name for own in whole.factors.values() for name in own})
    if not changed:  # numbered layers come first: engines serve no adapter of every head
        linear = [name for name in whole.centres if whole.names.get(name, name) in kinds]
        changed = sorted(linear, key=lambda name: (not any(map(str.isdigit, name.split("."))), name))[:1]
    if not changed:
        raise UsageError(f"the model of task `{task}` has no linear layer: no LoRA fits it", hint=HINT)
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    modules, conv = [], False
    for name in changed:
        own_name = whole.names.get(name, name)
        if own_name not in kinds:
            raise _refused(name, task, "is the weight of no linear layer")
        module, kind = kinds[own_name]
        dtype, left, right = _factors(bundle, whole, task, name)
        if kind == FAN_IN_FIRST:  # weights of [in, out]
            left, right = right.T, left.T
            conv = True
        arrays[f"base_model.model.{module}.lora_A.weight"] = dtype, right
        arrays[f"base_model.model.{module}.lora_B.weight"] = dtype, left
        modules.append(module)
    forms = {name: (dtype, tuple(array.shape)) for name, (dtype, array) in arrays.items()}
    write_weights(folder, LIBRARIES["peft"].stem, forms, lambda name: arrays[name][1], bundle.manifest.id)
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": None, "r": whole.rank, "lora_alpha": whole.rank, "lora_dropout": 0.0,
        "bias": "none", "target_modules": modules, "fan_in_fan_out": conv, "inference_mode": True,
        "base_model_name_or_path": f"../../{BASE}",
    }  # fmt: skip
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _factors(bundle: Bundle, whole: Factored, task: str, name: str) -> tuple[str, np.ndarray, np.ndarray]:
    """Return the dtype and the bits of left [m, rank] and right [rank, n], which are zeros where the task equals the
    centre."""
    m, n = whole.centres[name].shape
    stored = whole.factors[task].get(name)
    dtype = whole.centres[name].dtype if stored is None else stored[0].dtype  # which differ if the base's does
    left, right = np.zeros((m, whole.rank), NUMPY[dtype]), np.zeros((whole.rank, n), NUMPY[dtype])
    if stored is not None:
        own = [bundle.bits(part).reshape(part.shape) for part in stored]
        left[:, : own[0].shape[1]], right[: own[1].shape[0]] = own
    return dtype, left, right


def _modules(base: Path) -> dict[str, tuple[str, str]]:
    """Map each weight in the base folder that LoRA fits to the module that has it in transformers, and its kind."""
    try:
        import torch
        import transformers
    except ImportError:
        raise UsageError("transformers is not installed", hint="pip install 'flexmerge-cli[eval]'") from None
    try:
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
        named = (getattr(config, "architectures", None) or ["AutoModel"])[0]
        found = getattr(transformers, named)
        with torch.device("meta"):
            model = found(config) if named != "AutoModel" else transformers.AutoModel.from_config(config)
    except Exception as error:  # It comes from transformers, which raises many kinds of errors for odd configs.
        said = str(error).split("\n")[0][:200]
        raise UsageError(f"the tasks' config.json is of no model of transformers: {said}", hint=HINT) from None
    prefix = f"{model.base_model_prefix}."
    linear = {name: type(module).__name__ for name, module in model.named_modules() if type(module).__name__ in LINEAR}
    outer = {f"{name}.weight": (name, kind) for name, kind in linear.items()}
    bare = {weight.removeprefix(prefix): found for weight, found in outer.items() if weight.startswith(prefix)}
    return bare | outer


def _exported(manifest: Manifest, folder: Path) -> set[str] | None:
    """Return the files of a folder that such an export wrote, in `base` and below `adapters`; None if there are
    none."""
    inner = [BASE, *(f"{ADAPTERS}/{task}" for task in manifest.tasks)]
    found = {place: exported_files(manifest, folder / place) for place in inner if (folder / place).is_dir()}
    known = {f"{place}/{name}" for place, files in found.items() if files for name in {*files, CONFIG_NAME}}
    return known or None


def _commands(target: Path, tasks: tuple[str, ...], rank: int, *, has_base: bool) -> dict[str, list[str]]:
    """Map each engine to the command lines that serve the folder."""
    base = shlex.quote(f"{target}/{BASE}") if has_base else "BASE"
    paths = {task: f"{target}/{ADAPTERS}/{task}" for task in tasks}
    named = " ".join(shlex.quote(f"{task}={path}") for task, path in paths.items())
    # The ranks that vLLM knows: it takes the next one.
    allowed = next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
    first, *more = (f"{path!r}, adapter_name={task!r}" for task, path in paths.items())
    # By default vLLM has one adapter in a batch, and SGLang eight, where requests of the base count as one.
    vllm = f"--enable-lora --max-loras {len(tasks)} --max-lora-rank {allowed}"
    sglang = f"--enable-lora --max-loras-per-batch {len(tasks) + 1} --max-lora-rank {rank}"
    return {
        "vllm": [f"vllm serve {base} {vllm} --lora-modules {named}"],
        "sglang": [f"python -m sglang.launch_server --model-path {base} {sglang} --lora-paths {named}"],
        "peft": [f"model = PeftModel.from_pretrained(base, {first})", *(f"model.load_adapter({one})" for one in more)],
    }
