"""Makes the rows of one tensor's table: each possible centre, its bytes, and its distance to each task. Numpy only.

none      no centre; tasks are coded copies in 2, 3, 4 or 8 bits, or exact
base      one centre, dense or in 2, 3, 4 or 8 bits; residuals of 1, 2, 3, 4 or 8 bits, or exact
average   one centre per group of a level of the block's dendrogram; a class alone in its group is stored as for none
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flexmerge_cli.allocation.auto_statistics import Groups, TensorStatistics
from flexmerge_cli.checkpoint.dtypes import promote
from flexmerge_cli.request.auto_options import Kind
from flexmerge_cli.residuals.coding_error import WEIGHT_BITS

# M tasks, K classes of bit-identical tasks, C centres, G groups

CentreBits = int | Literal["dense"]

CENTRE_BITS: tuple[CentreBits, ...] = (*WEIGHT_BITS, "dense")

# How a class is stored: as a coded copy of its own, as a residual, or not at all because it equals its centre.
COPY, CODED, FREE = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoCentre:
    """One row of the table."""

    kind: Kind
    bits: CentreBits = "dense"
    groups: Groups = ()
    """Tasks that share a centre of kind `average`, ordered by smallest task. Tasks of one class are together."""


def centres_of(tensor: TensorStatistics, levels: Mapping[int, Groups]) -> list[AutoCentre]:
    """List no centre, the base, then the levels from one group up. A level that groups the classes like an earlier one
    is left out."""
    return list(_centres(tensor.same, tuple(levels[level] for level in sorted(levels))))


@functools.lru_cache(maxsize=256)
def _centres(same: tuple[int, ...], levels: tuple[Groups, ...]) -> list[AutoCentre]:
    """Make the centres of all tensors of a block whose equal tasks are the same."""
    found = [AutoCentre(kind="none")] + [AutoCentre(kind="base", bits=bits) for bits in CENTRE_BITS]
    seen: set[Groups] = set()
    for level in levels:
        group_of = {task: number for number, group in enumerate(level) for task in group}
        members: dict[int, list[int]] = {}
        for task, first in enumerate(same):
            members.setdefault(group_of[first], []).append(task)
        groups = tuple(sorted(tuple(tasks) for tasks in members.values()))
        if groups in seen or all(len({same[task] for task in group}) == 1 for group in groups):
            continue
        seen.add(groups)
        found += [AutoCentre(kind="average", bits=bits, groups=groups) for bits in CENTRE_BITS]
    return found


def centre_bytes(tensor: TensorStatistics, centres: list[AutoCentre]) -> np.ndarray:
    """Return the bytes of all the centres that each row of the table stores, int64 [C]."""
    code_bytes = tensor.code_bytes
    base = 0 if tensor.base_is_stored else tensor.dense_bytes(tensor.base_dtype)
    num_bytes = []
    groups, own = None, list[int]()  # centres of the same groups follow each other
    for centre in centres:
        if centre.kind == "base":
            groups, own = None, [base]
        elif centre.groups is not groups:
            groups = centre.groups
            own = [tensor.dense_bytes(dtype) for dtype in _shared_dtypes(groups, tensor.same, tensor.dtypes)]
        num_bytes.append(sum(own) if centre.bits == "dense" else len(own) * code_bytes[centre.bits])
    return np.array(num_bytes, np.int64)


@functools.lru_cache(maxsize=4096)
def _shared_dtypes(groups: Groups, same: tuple[int, ...], dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the dtype of the centre of each group that several classes share."""
    shared = [group for group in groups if len({same[task] for task in group}) > 1]
    return tuple(promote([dtypes[task] for task in group]) for group in shared)


def factors(tensor: TensorStatistics, centres: list[AutoCentre]) -> tuple[np.ndarray, np.ndarray]:
    """Return how each class is stored (COPY, CODED, FREE) and the factor of its unit costs before the weight w, [C, K]
    each.

    The factor of a residual is its energy: ‖τ - centre's τ‖² plus the error of coding the centre. The unit costs of a
    copy are errors already.
    """
    classes, least = tensor.classes, tensor.least_error
    firsts = [tasks[0] for tasks in classes]
    own_K = np.diag(tensor.gram)[firsts]
    sizes_K = np.array([len(tasks) for tasks in classes], np.float64)
    places: dict[tuple[Kind, Groups], int] = {}
    found: list[tuple[np.ndarray, np.ndarray]] = []
    """For each place, whether each class has a residual, and ‖τ - centre's τ‖²."""
    place_C, lost_C = np.zeros(len(centres), np.intp), np.zeros(len(centres))
    for row, centre in enumerate(centres):
        key = centre.kind, centre.groups
        if key not in places:
            places[key] = len(found)
            everyone = np.full(len(classes), centre.kind == "base")
            is_mean = centre.kind == "average"
            found.append(
                _distances_to_mean(tensor.gram, own_K, centre.groups, firsts) if is_mean else (everyone, own_K)
            )
        place_C[row] = places[key]
        errors = tensor.errors.base if centre.kind == "base" else tensor.errors.average
        lost_C[row] = 0.0 if centre.kind == "none" or centre.bits == "dense" else errors[centre.bits]
    shared_CK = np.array([shared_K for shared_K, _ in found])[place_C]
    squared_CK = np.array([np.maximum(squared_K, 0.0) for _, squared_K in found])[place_C]
    kind_CK = np.where(shared_CK, CODED, COPY)
    factor_CK = np.where(shared_CK, sizes_K * np.maximum(squared_CK + lost_C[:, None], least), sizes_K)
    for row, centre in enumerate(centres):
        if centre.kind == "base" and centre.bits == "dense":
            free_K = np.array([tensor.is_free(task) for task in firsts])
            kind_CK[row, free_K], factor_CK[row, free_K] = FREE, 0.0
    return kind_CK, factor_CK


def _distances_to_mean(
    gram: np.ndarray, energy_K: np.ndarray, groups: Groups, firsts: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each class shares its group, and ‖τ - mean of the group‖², which only rounding can make
    negative. energy_K: ‖τ‖² of each class."""
    member_GM, group_K, shares_K = _members(groups, len(gram), tuple(firsts))
    mean_GM = member_GM @ gram
    within_G = (mean_GM * member_GM).sum(axis=1)
    return shares_K, energy_K - 2 * mean_GM[group_K, firsts] + within_G[group_K]


@functools.lru_cache(maxsize=4096)
def _members(groups: Groups, num_tasks: int, firsts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the weight of each task in the mean of each group, [G, M], the group of each class, [K], and whether it
    shares that with others, bool [K]."""
    member_GM = np.zeros((len(groups), num_tasks))
    for number, group in enumerate(groups):
        member_GM[number, list(group)] = 1 / len(group)
    group_K = member_GM[:, list(firsts)].argmax(axis=0)
    return member_GM, group_K, np.bincount(group_K, minlength=len(groups))[group_K] > 1
