"""Measures accuracy against bytes: scores the tasks of a plan's layouts without writing a bundle.

A task of a layout is scored again only if its weights changed. That is decided by what determines their bits, before
anything is computed, and then by their digest, so that two methods that arrive at the same weights are scored once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.evaluation.ensembles import Ensemble
from flexmerge_cli.evaluation.in_memory import Key, MemoryBundles
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.evaluation.plane import Plane
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.scoring import Scorer

OnScore = Callable[[str, int, int], None]
"""Called with (what, evaluations done or saved, of how many)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveCut:
    """A layout to score, and the request that it comes from."""

    method: str
    """The method as requested."""
    sizes: tuple[str, ...]
    """The requested sizes that lead to this layout; empty if it is the method's own size."""
    layout: BundleLayout
    command: str
    """The command that writes the bundle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The scores of a layout, without the layout, to keep it small."""

    method: str
    sizes: tuple[str, ...]
    tensor_bytes: int
    total_bytes: int
    """The size of all files, as in an upload."""
    merges: int
    undone: int
    command: str
    scores: Mapping[str, Scored]
    """The scores by task."""
    digests: Mapping[str, str]
    """The digest of each task's weights."""
    num_computed: int
    """The number of tasks whose model was run for it."""
    num_cached: int
    """The number of tasks whose score was found on disk, from an earlier run. Tasks in neither count were scored
    before in this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreached:
    """A size that is smaller than what a method can reach."""

    method: str
    size: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Everything that was scored."""

    points: tuple[Point, ...]
    alternatives: tuple[Point, ...]
    """Copies in fewer bits."""
    unreached: tuple[Unreached, ...]
    ensembles: tuple[Ensemble, ...] | None = None
    """Ensembles of the fine-tuned models; None if they were not requested."""
    plane: Plane | None = None
    fine_tuned: dict[str, Scored]
    base: dict[str, Scored]
    models: dict[str, dict[str, TaskModel]]
    """Maps each task to `fine_tuned` and `base`, and these to the models that were scored."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Maps each task to the digest of its examples."""

    @property
    def num_evaluations(self) -> int:
        return sum(len(point.scores) for point in (*self.points, *self.alternatives))

    @property
    def counts(self) -> dict[str, int]:
        """The counts under `evaluations` in the document, without the references."""
        points = (*self.points, *self.alternatives)
        computed, cached = sum(point.num_computed for point in points), sum(point.num_cached for point in points)
        asked = self.num_evaluations
        return {"asked": asked, "computed": computed, "repeated": asked - computed - cached, "cached": cached}


@dataclass(kw_only=True)
class CurveScorer:
    """Scores layouts of one plan, one model at a time. Not thread-safe."""

    memory: MemoryBundles
    scorer: Scorer
    folders: Mapping[str, Path]
    """Maps each task to the folder of its side files."""
    references: Mapping[str, TaskModel]
    """Maps each task to its fine-tuned model, for metrics that compare with it."""
    reuse: bool = True
    _by_identity: dict[tuple[str, Key], tuple[str, Scored]] = field(default_factory=dict)
    _by_digest: dict[tuple[str, str], Scored] = field(default_factory=dict)

    def known(self, task: str, digest: str, scored: Scored) -> None:
        """Add a score that is already known, such as that of the fine-tuned model."""
        self._by_digest[task, digest] = scored

    def points(self, cuts: Sequence[CurveCut], on_score: OnScore = lambda *_step: None) -> Iterator[Point]:
        """Score from the largest layout to the smallest, so that few groups change from one to the next.

        Parts that no later layout stores are released before the next layout is made.
        """
        if not cuts:  # the method reaches none of the sizes
            return
        ordered = in_order(cuts)
        tasks = list(self.scorer.spec.tasks)
        numbers = {task.name: number for number, task in enumerate(ordered[0].layout.plan.tasks)}
        needed = self.memory.needed([cut.layout for cut in ordered], [numbers[task] for task in tasks])
        for place, cut in enumerate(ordered):
            self.memory.keep_only(needed[place])

            def on_task(number: int, place: int = place, cut: CurveCut = cut) -> None:
                on_score(f"{cut.method} at {format_size(cut)}", place * len(tasks) + number, len(ordered) * len(tasks))

            yield self._point(cut, tasks, numbers, on_task)

    def _point(
        self, cut: CurveCut, tasks: Sequence[str], numbers: Mapping[str, int], on_task: Callable[[int], None]
    ) -> Point:
        layout, num_computed, num_cached = cut.layout, 0, 0
        identities = {task: (task, self.memory.identity(layout, numbers[task])) for task in tasks}
        found = {
            task: self._by_identity[key] for task, key in identities.items() if self.reuse and key in self._by_identity
        }
        new = [task for task in tasks if task not in found]
        bundle = self.memory.bundle(layout, [numbers[task] for task in new]) if new else None
        for task in new:
            assert bundle is not None
            on_task(tasks.index(task))
            model = replace(bundle_model(bundle, task), folder=self.folders[task])
            scored = self._by_digest.get((task, model.digest)) if self.reuse else None
            if scored is None:
                before = self.scorer.counts
                scored = self.scorer.score(model, reference=self.references.get(task))
                was_run = self.scorer.counts["computed"] > before["computed"]
                num_computed += was_run
                num_cached += not was_run and self.scorer.counts["cached"] > before["cached"]
            found[task] = self._by_identity[identities[task]] = model.digest, scored
            self._by_digest[task, model.digest] = scored
        on_task(len(tasks))
        return Point(
            method=cut.method,
            sizes=cut.sizes,
            tensor_bytes=layout.tensor_bytes,
            total_bytes=layout.total_bytes,
            merges=layout.allocation.merges,
            undone=layout.allocation.undone,
            command=cut.command,
            scores={task: found[task][1] for task in tasks},
            digests={task: found[task][0] for task in tasks},
            num_computed=num_computed,
            num_cached=num_cached,
        )


def in_order(cuts: Sequence[CurveCut]) -> list[CurveCut]:
    """Return the cuts in the order in which they are scored."""
    return sorted(cuts, key=lambda cut: -cut.layout.tensor_bytes)


def format_size(cut: CurveCut | Point) -> str:
    return cut.sizes[0] if cut.sizes else "its own size"
