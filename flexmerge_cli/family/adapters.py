"""Finds the PEFT adapters among a family's tasks, and the models that they make of its base. Headers and configs only.

Collects the problems of all tasks before it raises.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.peft import CONFIG_NAME, WEIGHT_NAMES, Adapter, AdapterKind, is_adapter, read_adapter
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError
from flexmerge_cli.family import experts, fused
from flexmerge_cli.family.adapted import adapted, names_other_base
from flexmerge_cli.family.align import align

Adapters = Literal["keep", "merge", "pool"]
"""How tasks that are adapters are treated: kept as they are over the base, merged into it and then treated like any
fine-tune, or merged among themselves."""
BECOMES: dict[Adapters, str] = {"keep": "kept in", "merge": "merged into the base", "pool": "pooled"}
"""What becomes of an adapter then, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAdapter:
    """A task that stays an adapter."""

    name: str
    adapter: Adapter
    model: Checkpoint
    """The model that the adapter makes of the base."""
    names: dict[str, str]
    """Aligned name -> own name. The aligned name is the base's, or the own name if the base lacks the tensor."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Its own files."""
        return self.adapter.checkpoint

    @property
    def weights(self) -> Path:
        """Its weight file."""
        return self.checkpoint.weight_paths()[0]

    @property
    def identity(self) -> tuple[str, ...]:
        """The names of the files that, with the base, determine its model."""
        return CONFIG_NAME, self.weights.name

    def files(self) -> dict[str, tuple[Path, int]]:
        """Map each name to path and bytes, for all files of its folder; weights may not be on this disk yet."""
        side = {name: (path, path.stat().st_size) for name, path in self.checkpoint.side_files.items()}
        return side | {self.weights.name: (self.weights, self.checkpoint.weight_bytes[self.weights])}

    def changed(self) -> dict[str, StoredTensor]:
        """Map each aligned name to what is read for it, for all tensors that are not the base's own."""
        made = {aligned: self.model.tensors[own] for aligned, own in self.names.items()}
        return {name: found for name, found in made.items() if found.change is not None or found.path == self.weights}


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The tasks of a family by how they are stored."""

    base: Checkpoint
    """The model that the others are compared with."""
    models: Mapping[str, Checkpoint]
    """The tasks that merge: whole models, models that adapters make of the base, or the adapters of a pool."""
    kept: tuple[KeptAdapter, ...]
    """The tasks that stay adapters, in code-point order of name."""
    merges_products: bool = False
    """Whether the tensors that merge are pairs of factors, whose products merge (factors.py)."""

    @property
    def kinds(self) -> dict[str, str | None]:
        """The kind of each task's adapter, or None."""
        kept = {each.name: each.adapter.kind.value for each in self.kept}
        return {name: model.adapter for name, model in self.models.items()} | kept


def members_of(
    base: Checkpoint, tasks: Mapping[str, Checkpoint], mode: Adapters, *, assume_base: bool = False
) -> Members:
    """Return each task as the member it is: a whole model, or an adapter that is kept, merged or pooled.

    Raises DataError that lists every adapter that cannot be read, fits no base, or cannot be in a pool.
    """
    adapters = _adapters_of(base, tasks, assume_base=assume_base)
    if len(adapters) == len(tasks):  # a whole model has its own form
        modules = {module for each in adapters.values() for module in (*each.factors, *each.vectors)}
        base = fused.for_modules([f"{module}.weight" for module in sorted(modules)], base)
    models = _models_of(base, tasks, adapters)
    if mode == "pool":
        pooled = _pool_base(base, tasks, adapters)
        members = {name: replace(tasks[name], adapter=adapter.kind.value) for name, adapter in adapters.items()}
        by_products = any(adapter.kind is AdapterKind.LORA for adapter in adapters.values())
        return Members(base=pooled, models=members, kept=(), merges_products=by_products)
    names = sorted(adapters) if mode == "keep" else []
    kept = tuple(_keep(base, name, adapters[name], models.pop(name)) for name in names)
    # Kept adapters need the base unchanged.
    if not kept:
        base = fused.in_form_of(list(models.values()), experts.in_form_of(list(models.values()), base))
    return Members(base=base, models=models, kept=kept)


def _adapters_of(base: Checkpoint, tasks: Mapping[str, Checkpoint], *, assume_base: bool = False) -> dict[str, Adapter]:
    """Map each task that is an adapter to its adapter.

    Raises DataError that lists every adapter that cannot be read or names another base. With assume_base, the base that
    an adapter names is ignored.
    """
    found: dict[str, Adapter] = {}
    problems: list[DataError] = []
    others: list[str] = []
    for task, checkpoint in tasks.items():
        if {path.name for path in checkpoint.weight_paths()} <= set(WEIGHT_NAMES) and not is_adapter(checkpoint):
            missing = f"task `{task}`: {checkpoint.path} holds an adapter's weights and no {CONFIG_NAME}"
            problems.append(DataError(missing, hint="download the whole folder"))
            continue
        if not is_adapter(checkpoint):
            continue
        try:
            found[task] = read_adapter(checkpoint)
        except DataError as error:
            problems.append(DataError(f"task `{task}`: {error.message}", hint=error.hint))
            continue
        other = None if assume_base else names_other_base(found[task], base)
        if other is not None:
            others.append(f"task `{task}` was trained on `{other[:200]}`, the base is {base.source} ({base.path})")
    if others:
        hint = "give that base with --base, or --assume-base if it is the same model"
        problems.append(DataError("adapters trained on another base:\n  " + "\n  ".join(others), hint=hint))
    if is_adapter(base):
        hint = "give the model it was trained on as the base, and the adapter as a task"
        problems.append(DataError(f"the base {base.path} is an adapter", hint=hint))
    if problems:
        raise DataError("\n".join(error.message for error in problems), hint=problems[0].hint)
    return found


def _models_of(
    base: Checkpoint, tasks: Mapping[str, Checkpoint], adapters: Mapping[str, Adapter]
) -> dict[str, Checkpoint]:
    """Return the model of every task, with adapters applied to the base. Raises DataError that lists all that do not
    fit."""
    models: dict[str, Checkpoint] = {}
    problems: list[DataError] = []
    for task, checkpoint in tasks.items():
        try:
            models[task] = adapted(adapters[task], base) if task in adapters else checkpoint
        except DataError as error:
            problems.append(DataError(f"task `{task}`: {error.message}", hint=error.hint))
    if problems:
        raise DataError("\n".join(error.message for error in problems), hint=problems[0].hint)
    return models


def _keep(base: Checkpoint, name: str, adapter: Adapter, model: Checkpoint) -> KeptAdapter:
    """Align the names of the model that an adapter makes, which can differ only by a prefix."""
    names = align(base.tensors, model.tensors).names
    return KeptAdapter(name=name, adapter=adapter, model=model, names={aligned: own for own, aligned in names.items()})


def _pool_base(base: Checkpoint, tasks: Mapping[str, Checkpoint], adapters: Mapping[str, Adapter]) -> Checkpoint:
    """Return the base that a pool of adapters is compared with: their own tensors, all 1 for (IA)³, all 0 for LoRA.

    Raises DataError unless all tasks are adapters of one kind, and LoRAs have one rank and scale in every module.
    """
    whole = [task for task in tasks if task not in adapters]
    kinds = {adapters[task].kind for task in tasks if task in adapters}
    hint = "use --adapters keep or merge, which accept any mix of tasks"
    if whole:
        raise DataError(
            f"a pool can hold only adapters, but these tasks are whole models: {', '.join(whole[:10])}", hint=hint
        )
    if len(kinds) > 1:
        of = {kind: [task for task, adapter in adapters.items() if adapter.kind is kind] for kind in sorted(kinds)}
        listed = "; ".join(f"{kind.value}: {', '.join(names[:5])}" for kind, names in of.items())
        raise DataError(f"a pool can hold only adapters of one kind, but found: {listed}", hint=hint)
    forms: dict[str, tuple[str, float, int]] = {}
    problems = []
    for task, adapter in adapters.items():
        for module, factors in adapter.factors.items():
            form = (task, factors.scale, factors.a.shape[0])
            first = forms.setdefault(module, form)
            if first[1:] != form[1:]:
                both = [f"rank {rank}, scale {scale:g} in `{name}`" for name, scale, rank in (form, first)]
                problems.append(f"`{module}` has {both[0]}, {both[1]}")
    if problems:
        raise DataError(
            "the LoRA adapters of a pool must have the same rank and scale:\n  " + "\n  ".join(problems[:10]), hint=hint
        )
    tensors: dict[str, StoredTensor] = {}
    for adapter in adapters.values():
        fill = 1.0 if adapter.kind is AdapterKind.IA3 else 0.0
        for factor in adapter.tensors():
            tensors.setdefault(
                factor.name, replace(factor, path=base.path, offset=0, strides=None, stream=None, fill=fill)
            )
    return replace(base, tensors=tensors, weight_bytes={}, config={}, side_files={}, parts={}, remote={})
