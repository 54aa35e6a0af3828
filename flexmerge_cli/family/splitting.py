"""Splits the mergeable tensors of a family by the `split` rules of a rules file. Headers only."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from flexmerge_cli.errors import UsageError
from flexmerge_cli.family.blocks import rules_of
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.family import Family, FamilyTensor
from flexmerge_cli.family.split import Split, whole_of
from flexmerge_cli.family.vocabulary import split_vocabularies
from flexmerge_cli.record import Shape


def find_splits(shapes: Mapping[str, Shape], blocks: str | Path) -> tuple[Split, ...]:
    """Return the splits of these tensors. The first rule whose pattern matches and whose axis a tensor has decides.

    Raises UsageError that lists every tensor whose axis is not a multiple of the number of parts.
    """
    rules, found, problems = rules_of(blocks).splits, [], []
    for name, shape in shapes.items():
        inner = name.rpartition("/")[2]
        rule = next((rule for rule in rules if rule.dim < len(shape) and rule.pattern.search(inner)), None)
        if rule is None:
            continue
        if shape[rule.dim] % rule.parts or not shape[rule.dim]:
            problems.append(f"`{name}` {list(shape)}: axis {rule.dim} has {shape[rule.dim]}, parts are {rule.parts}")
        else:
            found.append(Split(tensor=name, dim=rule.dim, parts=rule.parts))
    if problems:
        more = f"\n  … {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UsageError(
            f"{blocks} splits tensors into parts that are not equal:\n  " + "\n  ".join(problems[:20]) + more,
            hint="give a number of parts that divides the axis, such as the number of heads",
        )
    return tuple(found)


def divided(family: Family, blocks: str | Path) -> Family:
    """Divide tensors into the rows and parts that are compared. Ties must be settled. Raises like `split_tensors`."""
    return split_tensors(split_vocabularies(family), blocks)


def split_tensors(family: Family, blocks: str | Path) -> Family:
    """Make each part of a split tensor a tensor of the family. Raises UsageError like `find_splits`, and for adapters.

    Tensors that do not merge stay whole, and so do vocabularies and the targets of tied tensors.
    """
    if not rules_of(blocks).splits:
        return family
    if family.kept or any(t.base is not None and t.base.fill is not None for t in family.tensors):
        raise UsageError(
            f"{blocks} splits tensors, but kept or pooled adapters need whole ones",
            hint="plan with --adapters merge, or leave out `split`",
        )
    whole = {name for vocabulary in family.vocabularies for name in vocabulary.tensors}
    whole |= {tensor.reason for tensor in family.tensors if tensor.tensor_class is TensorClass.TIED}
    shapes = {
        tensor.name: tensor.base.shape
        for tensor in family.tensors
        if tensor.tensor_class is TensorClass.MERGEABLE and tensor.base is not None and tensor.name not in whole
    }
    splits = find_splits(shapes, blocks)
    if not splits:
        raise UsageError(
            f"no tensor that merges matches a pattern in `split` of {blocks}",
            hint="patterns are like those of `rules`: N.self_attn.q_proj",
        )
    by_name = {split.tensor: split for split in splits}
    return replace(
        family,
        tensors=tuple(
            part
            for tensor in family.tensors
            for part in (_parts(tensor, by_name[tensor.name]) if tensor.name in by_name else [tensor])
        ),
        own_names=tuple(_own_names(names, by_name) for names in family.own_names),
        splits=splits,
    )


def _parts(tensor: FamilyTensor, split: Split) -> list[FamilyTensor]:
    assert tensor.base is not None
    return [
        replace(
            tensor,
            name=name,
            base=split.take(tensor.base, name),
            tasks=tuple(found and split.take(found, name) for found in tensor.tasks),
        )
        for name in split.names
    ]


def _own_names(names: Mapping[str, str], splits: Mapping[str, Split]) -> dict[str, str]:
    found = {aligned: own for aligned, own in names.items() if aligned not in splits}
    for split in splits.values():
        if split.tensor in names:
            own = Split(tensor=names[split.tensor], dim=split.dim, parts=split.parts)
            found |= dict(zip(split.names, own.names))
    return found


def require_splits(shapes: Mapping[str, Shape], splits: tuple[Split, ...], blocks: str | Path) -> None:
    """Raise UsageError unless a rules file splits these tensors as they were when their weights were compared.

    shapes: those of all tensors that merge; split tensors appear under the names of their parts. A rules file without
    `split` fits any plan: its blocks hold the parts together.
    """
    if not rules_of(blocks).splits:
        return
    whole = {name: shape for name, shape in shapes.items() if whole_of(name)[1] is None}
    some = {split.tensor: next((n for n in split.names if n in shapes), None) for split in splits}
    whole |= {split.tensor: split.whole(shapes[name]) for split in splits if (name := some[split.tensor])}
    if set(find_splits(whole, blocks)) != {split for split in splits if some[split.tensor]}:
        raise UsageError(
            f"{blocks} splits other tensors than this plan, whose weights were compared with its own splits",
            hint=f"make the plan from its sources again: flexmerge plan --base … --tasks … --blocks {blocks}",
        )
