"""Measures how unevenly the frequencies of weight matrices are filled: in the tasks' own changes, and in a bundle's.

FREE-Merging (Zheng & Wang 2025, Table 1) reports by how much merging lowers the variance of amplitudes in the frequency
domain, but gives no formula. Here the variance of a matrix D is

    Var |F(D)| / (Mean |F(D)|)²,

over all frequencies of its two-dimensional discrete Fourier transform F(D). It has no unit: a factor of D cancels. It
is 0 for a single element that is not zero, and near 4/π - 1 = 0.273 for white noise. D is a fine-tuned model minus the
base, or what the bundle gives back of it minus the base.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.checkpoint.dtypes import to_float32
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.sources import BASE
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.evaluation.models import StoredWeights
from flexmerge_cli.formats.manifest_records import UnitEntry
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.methods.matrices import is_matrix
from flexmerge_cli.planning.sources import open_sources

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpectrum:
    """The variances of a block, means over its matrices and tasks. A task that did not change a matrix, and one to
    which the bundle gives back the base's matrix, do not count there."""

    name: str
    methods: tuple[str, ...]
    """The methods of its groups; `copy` for groups that are stored exactly."""
    pairs: int
    """The number of matrices and tasks that count."""
    own: float | None
    """The mean of the tasks' own changes; None without pairs."""
    stored: float | None
    """The mean of what the bundle gives back."""

    @property
    def change(self) -> float | None:
        """By how much the bundle's variance is above the tasks' own, as a part of it; None where that is 0 or None."""
        return None if not self.own or self.stored is None else self.stored / self.own - 1


def spectrum(
    bundle: Bundle,
    plan: Plan,
    folder: Path,
    *,
    relocate: Mapping[str, str] | None = None,
    access: Access = ONLINE,
    on_progress: OnProgress = lambda _what, _done, _total: None,
) -> list[BlockSpectrum]:
    """Measure every block with a matrix. It holds one matrix, its change and its transform at a time.

    folder: the folder that the plan's relative sources are relative to.
    Raises UsageError if the bundle is of another plan, or its tensors merge by products, DataError if a source has
    changed since the plan, and whatever reading raises.
    """
    if bundle.manifest.plan != plan.sha256:
        raise UsageError(
            f"{bundle.path} was made from plan {bundle.manifest.plan[:16]}…, but this is plan {plan.sha256[:16]}…",
            hint="give the plan that the bundle was made from",
        )
    if plan.merges_products:
        raise UsageError("frequencies of the factors of LoRA adapters mean nothing", hint="leave out --spectrum")
    sources = open_sources(plan, folder, relocate, access)
    fetch(sources.to_fetch(), access, on_progress)
    located, weights = sources.located, StoredWeights({})

    def read(source: StoredTensor, model: int, name: str) -> np.ndarray:
        bits, record = np.ascontiguousarray(weights.array(source)), plan.tensor(name)
        expected = record.base_digest if model == BASE else record.digests[model]
        if digest_bytes(bits.reshape(-1).view(np.uint8)) != expected:
            raise DataError(
                f"{located.describe[model]} has changed since the plan: `{name}`", hint="make the plan again"
            )
        return to_float32(bits, source.dtype)

    def variances(name: str, tasks: list[str]) -> Iterator[tuple[float, float]]:
        base = read(located.base[name], BASE, name)
        stored_as, known = {t.name: t for t in bundle.manifest.stored}, dict[object, float | None]()
        for task in tasks:
            model, key = plan.task_names.index(task), bundle.identity(task, name)
            if key not in known:  # all tasks of a group may read one value
                given = to_float32(bundle.stored(task, name), stored_as[name].dtype_of(task))
                known[key] = variance(given - base)
            own = variance(read(located.tasks[model][name], model, name) - base)
            if own is not None and (stored := known[key]) is not None:
                yield own, stored

    found = []
    for number, unit in enumerate(bundle.manifest.units):
        on_progress("spectrum", number, len(bundle.manifest.units))
        matrices = [name for name in unit.tensors if is_matrix(name, plan.tensor(name).shape, "linear")]
        tasks = [task for group in unit.groups for task in group.tasks]
        pairs = [pair for name in matrices for pair in variances(name, tasks)]
        own, stored = np.mean(pairs, axis=0).tolist() if pairs else (None, None)
        if matrices:
            methods = _methods(bundle, unit)
            found.append(BlockSpectrum(name=unit.name, methods=methods, pairs=len(pairs), own=own, stored=stored))
    return found


def variance(matrix: np.ndarray) -> float | None:
    """Return Var |F| / (Mean |F|)² of a real matrix [m, n], n >= 1; None for a matrix of zeros."""
    amplitudes = np.abs(np.fft.rfft2(matrix.astype(np.float64)))
    columns = matrix.shape[1]
    # A real matrix has the same amplitude at opposite frequencies, so rfft2 leaves out half of the columns.
    weights = np.full(amplitudes.shape[1], 2.0)
    weights[0] = 1.0
    if columns % 2 == 0:
        weights[-1] = 1.0
    mean = float((amplitudes.mean(0) * weights).sum() / columns)
    if mean == 0:
        return None
    amplitudes /= mean
    amplitudes -= 1.0
    np.square(amplitudes, out=amplitudes)
    return float((amplitudes.mean(0) * weights).sum() / columns)


def _methods(bundle: Bundle, unit: UnitEntry) -> tuple[str, ...]:
    methods = bundle.manifest.methods
    return tuple(dict.fromkeys("copy" if group.method is None else methods[group.method].name for group in unit.groups))
