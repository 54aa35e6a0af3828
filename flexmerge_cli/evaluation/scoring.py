"""Scores one task's model on one task's data: the only entry into the kinds.

`Scorer` prepares a task's examples once and scores any number of models on them; `score` scores one model. Scores are
cached on disk by weights, data and settings (cache.py).
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.cache import ScoreCache, key_of
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Examples, Place, Run
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.side_files import side_digest
from flexmerge_cli.evaluation.spec import EvalSpec
from flexmerge_cli.version import VERSION

OnExample = Callable[[int, int], None]

LIBRARIES = ("lm_eval", "numpy", "pillow", "tokenizers", "torch", "torchvision", "transformers")
NOT_OF_A_SCORE = {"data", "checkpoint", "limit", "seed", "device", "batch_size", "dtype", "head", "gate"}
"""Keys of a spec that are reported elsewhere, or do not affect a score."""


@dataclass(kw_only=True)
class Scorer:
    """The tasks of a spec, ready to be scored. Not thread-safe."""

    spec: EvalSpec
    device: str | None = None
    """The device, which overrides the spec's; `auto` if neither is given."""
    cache: ScoreCache | None = field(default_factory=ScoreCache)
    """The score cache. None means that nothing is looked up or kept."""
    access: Access = ONLINE
    """Access to models that a task names besides its own."""
    num_computed: int = 0
    """The number of times that a model was run on a task's examples."""
    num_repeated: int = 0
    """The number of scores of weights that this scorer had already scored or found."""
    num_cached: int = 0
    """The number of scores found on disk, from earlier runs."""
    _examples: dict[tuple[str, str], Examples] = field(default_factory=dict)
    """Maps (task, digest of the side files) to examples: tasks with the same config and tokenizer share them."""
    _sides: dict[Path, str] = field(default_factory=dict)
    _references: dict[tuple[str, str], Scored] = field(default_factory=dict)
    """Maps (task, digest) to the outputs of a fine-tuned model, for agreement."""
    _keys: set[str] = field(default_factory=set)
    """Keys of the scores that this scorer knows to be on disk."""

    def examples(self, task: str, side: Path) -> Examples:
        """Return the examples, read and checked once. side: folder of config, tokenizer, processor. Reads no weights.

        Raises UsageError with file, line and key for errors in the spec, SourceError, DataError.
        """
        if side not in self._sides:
            self._sides[side] = side_digest(side)
        key = (task, self._sides[side])
        if key not in self._examples:
            self._examples[key] = self.spec.kind(task).prepare(
                self.spec.settled(task), self.spec.place(task, side, self.access)
            )
        return self._examples[key]

    def run(self, task: str, on_example: OnExample = lambda _done, _total: None) -> Run:
        """Return the settings of a task's computation."""
        from flexmerge_cli.engine.device import choose_device

        settled = self.spec.settled(task)
        device = str(choose_device(self.device or settled.device or "auto"))
        size = settled.batch_size or self.spec.kind(task).batch_size
        return Run(device=device, dtype=settled.dtype, batch_size=size, on_example=on_example)

    def score(
        self,
        model: TaskModel,
        *,
        reference: TaskModel | None = None,
        on_example: OnExample = lambda _done, _total: None,
    ) -> Scored:
        """Score the model on its task's examples. Further metrics of the task are in `others`.

        reference: the task's fine-tuned model, which `agreement` compares with; its outputs are kept.
        """
        examples = self.examples(model.task, model.folder)
        if examples.metrics != (AGREEMENT,):
            return self._computed(model, examples, on_example)
        if reference is None:
            raise no_reference(self.spec.place(model.task, model.folder))
        key = (model.task, reference.digest)
        if key not in self._references:
            self._references[key] = self._computed(reference, examples, on_example)
        return _agreement(self._computed(model, examples, on_example), self._references[key])

    def _computed(self, model: TaskModel, examples: Examples, on_example: OnExample) -> Scored:
        kind, task, run = self.spec.kind(model.task), self.spec.settled(model.task), self.run(model.task, on_example)
        cache = self.cache if kind.cached else None
        key = key_of(self._settings(model, examples, run)) if cache is not None else ""
        known = cache.get(key) if cache is not None else None
        if known is not None:
            self.num_repeated += key in self._keys
            self.num_cached += key not in self._keys
            self._keys.add(key)
            return known
        first, *others = kind.score(model, task, examples, run)
        scored = replace(first, others=tuple(others))
        self.num_computed += 1
        if cache is not None:
            cache.put(key, scored)
            self._keys.add(key)
        return scored

    @property
    def counts(self) -> dict[str, int]:
        """The number of scores from each origin."""
        return {"computed": self.num_computed, "repeated": self.num_repeated, "cached": self.num_cached}

    def _settings(self, model: TaskModel, examples: Examples, run: Run) -> Mapping[str, Any]:
        """Return everything that a score depends on."""
        return {
            "weights": model.digest,
            "data": examples.digest,
            "rest": examples.rest(),
            "side": side_digest(model.folder),
            "task": self.spec.settled(model.task).model_dump(mode="json", exclude=NOT_OF_A_SCORE),
            "metrics": examples.metrics,
            "dtype": run.dtype,
            "batch_size": run.batch_size,
            "device": run.device.split(":")[0],
            "versions": library_versions(),
        }


@cache
def library_versions() -> dict[str, str]:
    """Return the versions of flexmerge and of the installed libraries that affect scores."""
    found = {"flexmerge": VERSION}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def score(
    spec: EvalSpec,
    task: str,
    model: TaskModel,
    *,
    device: str | None = None,
    reference: TaskModel | None = None,
    cache: ScoreCache | None = None,
) -> Scored:
    """Score one model on one task of a spec. Without a cache, nothing is looked up or kept."""
    assert model.task == task
    return Scorer(spec=spec, device=device, cache=cache).score(model, reference=reference)


def no_reference(place: Place) -> UsageError:
    said = "`agreement` compares with the task's fine-tuned model, and there is none"
    return place.error("metric", said, hint="checkpoint: path/of/it, or --plan plan.json")


def _agreement(outputs: Scored, reference: Scored) -> Scored:
    """Return how often two models agree and, if they have distributions, how far these are apart."""
    agreed = replace(outputs, labels=reference.predictions)
    is_text = agreed.predictions.ndim == 1
    return agreed if is_text else replace(agreed, others=(replace(agreed, metric="kl_divergence"),))
