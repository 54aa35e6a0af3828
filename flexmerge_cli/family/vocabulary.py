"""Splits vocabularies that differ between base and tasks, so that the rows that all models share are one tensor.

Such a tensor, with one row per token, becomes two. One has its own name and the rows that the base and all tasks have,
in the base's order, which merge like any other tensor. The other, `<tensor>@rows`, has the other rows of each task,
private. The tokenizers tell which row is which token; without them, and for rows without a token (padding), rows are
compared by position. A row of the base that some task lacks is in the others' `@rows`, or in no task.

Vocabularies of one size in all models are left as they are unless a tokenizer moved a token or gave a row to a new one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flexmerge_cli.checkpoint.rows import Runs, num_rows, other_rows, runs_of
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.checkpoint.tokenizer import Tokens, is_one_tokenizer, read_tokens
from flexmerge_cli.family.classes import HEADS, TensorClass, embeds
from flexmerge_cli.family.family import ROWS_SUFFIX, Family, FamilyTensor, RowMap, Vocabulary

# Names of output layers: the segment before `weight` or `bias`.
OUTPUTS = ("lm_head", "embed_out", "proj_out", "output_projection", "vocab_projector", "generator_lm_head")
OUTPUT_PARENTS = ("predictions", "lm_head")  # with `decoder` below them, or their own bias
MAX_CONFIG_DEPTH = 4
ROWS_REASON = "rows of its own vocabulary"

Sizes = tuple[int, ...]
"""The numbers of rows of a tensor in the base and in each task."""


def split_vocabularies(family: Family) -> Family:
    """Split the vocabularies of a family. Reads tokenizer files if one of its tensors has a row per token. Ties must be
    settled.

    If adapters are kept, a tensor is split only if all rows of the base are common: adapters need the base whole.
    """
    members = _members(family)
    if not members:
        return family
    tokens = _tokens(family)
    split: dict[str, tuple[FamilyTensor, FamilyTensor]] = {}
    vocabularies = []
    for sizes, tensors in members.items():
        found = _row_maps(sizes, tokens)
        if found is None or (family.kept and num_rows(found[0].common) < found[0].rows):
            continue
        names = [tensor.name for tensor in tensors]
        tied = [t for t in family.tensors if t.tensor_class is TensorClass.TIED and t.reason in names]
        vocabulary = Vocabulary(tensors=(*names, *(t.name for t in tied)), base=found[0], tasks=found[1])
        vocabularies.append(vocabulary)
        split |= {tensor.name: _split(tensor, vocabulary) for tensor in [*tensors, *tied]}
    rows = [own for _, own in split.values() if own.present and own.tensor_class is not TensorClass.TIED]
    return replace(
        family,
        tensors=tuple(split[tensor.name][0] if tensor.name in split else tensor for tensor in family.tensors),
        vocabularies=tuple(vocabularies),
        rows=tuple(rows),
    )


def match_rows(base: Mapping[str, int], task: Mapping[str, int], base_rows: int, task_rows: int) -> np.ndarray:
    """Return the task's row for each of the base's, -1 where it has none; int64 [base_rows].

    Rows are matched by token. A row to which the task gives no token stands for the base's at its place, if no token
    claims it.
    """
    own = np.full(base_rows, -1, np.int64)
    is_named = np.zeros(task_rows, bool)
    is_taken = np.zeros(task_rows, bool)
    for token, row in sorted(task.items(), key=lambda item: (item[1], item[0])):
        if row >= task_rows:  # a tokenizer may know more tokens than there are rows
            continue
        is_named[row] = True
        at = base.get(token, base_rows)
        if at < base_rows and own[at] < 0 and not is_taken[row]:
            own[at], is_taken[row] = row, True
    places = np.flatnonzero(~is_named[:base_rows])
    places = places[own[places] < 0]
    own[places] = places
    return own


def leading_rows(base_rows: int, task_rows: int) -> np.ndarray:
    """Return the common rows, matched by position alone."""
    own = np.arange(base_rows)
    own[task_rows:] = -1
    return own


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokenizers:
    """What is known about the models' tokens."""

    base: Tokens
    tasks: tuple[Tokens, ...]
    """The tokens of each task; the same object as `base` if the files are the same."""


def _tokens(family: Family) -> _Tokenizers:
    base = read_tokens(family.base.side_files)
    tasks = [
        base if is_one_tokenizer(family.base.side_files, task.side_files) else read_tokens(task.side_files)
        for task in family.tasks
    ]
    return _Tokenizers(base=base, tasks=tuple(tasks))


def _row_maps(sizes: Sizes, tokens: _Tokenizers) -> tuple[RowMap, tuple[RowMap, ...]] | None:
    """Return the row maps of the base and of each task; None if all rows are alike, or none is common."""
    base_rows, *of_tasks = sizes
    own_TV, leading = [], []
    for rows, of_task in zip(of_tasks, tokens.tasks):
        why = ""
        if tokens.base.rows is None or of_task.rows is None:
            who, known = ("the base", tokens.base) if tokens.base.rows is None else ("the task", of_task)
            why = f"{who}: {known.why}"
            own_TV.append(leading_rows(base_rows, rows))
        elif of_task is tokens.base:
            own_TV.append(leading_rows(base_rows, rows))
        else:
            own_TV.append(match_rows(tokens.base.rows, of_task.rows, base_rows, rows))
        leading.append(why)
    common = np.flatnonzero(np.all(np.array(own_TV) >= 0, axis=0))
    is_plain = len(set(sizes)) == 1 and all(np.array_equal(own, np.arange(base_rows)) for own in own_TV)
    if is_plain or not len(common):
        return None
    maps = tuple(
        RowMap(rows=rows, common=runs_of(own[common].tolist()), leading=why)
        for rows, own, why in zip(of_tasks, own_TV, leading)
    )
    return RowMap(rows=base_rows, common=runs_of(common.tolist()), leading=""), maps


def _split(tensor: FamilyTensor, vocabulary: Vocabulary) -> tuple[FamilyTensor, FamilyTensor]:
    """Split a tensor into the common rows and the other rows of each task."""

    def taken(stored: StoredTensor | None, runs: Runs) -> StoredTensor | None:
        return stored.take(runs) if stored is not None else None

    tied = tensor.tensor_class is TensorClass.TIED
    common = replace(
        tensor,
        base=None
        if tied
        else taken(tensor.base, vocabulary.base.common),  # for a tied tensor only the tasks' forms count
        tasks=tuple(taken(stored, rows.common) for stored, rows in zip(tensor.tasks, vocabulary.tasks)),
        tensor_class=TensorClass.TIED if tied else TensorClass.MERGEABLE,
        reason=tensor.reason if tied else "",
        resized=False,
    )
    own = FamilyTensor(
        name=f"{tensor.name}{ROWS_SUFFIX}",
        base=None,
        tasks=tuple(
            taken(stored, other_rows(rows.common, rows.rows)) if num_rows(rows.common) < rows.rows else None
            for stored, rows in zip(tensor.tasks, vocabulary.tasks)
        ),
        tensor_class=TensorClass.TIED if tied else TensorClass.PRIVATE,
        reason=ROWS_REASON,
    )
    return common, own


def _members(family: Family) -> dict[Sizes, list[FamilyTensor]]:
    """Find the tensors with one row per token, by their numbers of rows: matrices with the name of a vocabulary, or
    with as many rows as the configs' `vocab_size`, and other tensors that were resized like them."""
    found: dict[Sizes, list[FamilyTensor]] = {}
    candidates = [t for t in family.tensors if _could_be(t)]
    vocab_sizes = [set(_vocab_sizes(model.config)) for model in (family.base, *family.tasks)]
    known = {
        _sizes(tensor)
        for tensor in candidates
        if len(tensor.tasks[0].shape if tensor.tasks[0] else ()) == 2
        and (is_vocabulary_name(tensor.name) or (tensor.resized and _are_vocab_sizes(_sizes(tensor), vocab_sizes)))
    }
    for tensor in candidates:
        if _sizes(tensor) in known and (tensor.resized or is_vocabulary_name(tensor.name)):
            found.setdefault(_sizes(tensor), []).append(tensor)
    return found


def _could_be(tensor: FamilyTensor) -> bool:
    if tensor.base is None or len(tensor.base.shape) not in (1, 2):
        return False
    if tensor.name.rpartition("/")[2].removeprefix("model.").split(".")[0] in HEADS:
        return False
    return tensor.tensor_class is TensorClass.MERGEABLE or (
        tensor.tensor_class is TensorClass.PRIVATE and tensor.resized
    )


def is_vocabulary_name(name: str) -> bool:
    """Return whether a name is that of a token embedding, an output layer over tokens, or the bias of the latter."""
    segments = name.split(".")
    if any("pos" in segment for segment in segments):  # embed_positions, position_embeddings, pos_embed
        return False
    *_, grandparent, parent, last = ["", "", *segments]
    is_output = parent in OUTPUTS or (parent == "decoder" and grandparent in OUTPUT_PARENTS)
    if last == "bias":
        return is_output or parent in OUTPUT_PARENTS
    return last == "weight" and (is_output or embeds(name))


def _sizes(tensor: FamilyTensor) -> Sizes:
    assert tensor.base is not None
    return (tensor.base.shape[0], *(stored.shape[0] if stored is not None else 0 for stored in tensor.tasks))


def _are_vocab_sizes(sizes: Sizes, vocab_sizes: Sequence[set[int]]) -> bool:
    """Return whether at least one config names a vocabulary size, and every config that does names this one."""
    named = [(size, known) for size, known in zip(sizes, vocab_sizes) if known]
    return bool(named) and all(size in known for size, known in named)


def _vocab_sizes(config: Mapping[str, Any], depth: int = 0) -> Iterator[int]:
    """Yield `vocab_size`, including that of parts of the model: `text_config`, `decoder`."""
    for key, value in config.items():
        if key == "vocab_size" and type(value) is int:
            yield value
        elif isinstance(value, Mapping) and depth < MAX_CONFIG_DEPTH:
            yield from _vocab_sizes(value, depth + 1)
