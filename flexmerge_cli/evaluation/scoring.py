"""One task's model on one task's data: the one entry into the kinds.

`Scorer` prepares a task's examples once, and scores any number of models on them; `score` is one of each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Examples, Run
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.spec import EvalSpec

OnExample = Callable[[int, int], None]


@dataclass(kw_only=True)
class Scorer:
    """The tasks of a spec, ready to be scored. Not for several threads."""

    spec: EvalSpec
    device: str | None = None
    """Instead of the spec's; `auto` where neither says."""
    _examples: dict[tuple[str, Path], Examples] = field(default_factory=dict)
    _references: dict[tuple[str, str], Scored] = field(default_factory=dict)
    """(task, digest) -> a fine-tuned model's outputs, for agreement."""

    def examples(self, task: str, side: Path) -> Examples:
        """Read and checked once. side: folder of config, tokenizer, processor. Reads no weight.

        Raises UsageError with file, line and key for what is wrong in the spec, SourceError, DataError.
        """
        key = (task, side)
        if key not in self._examples:
            self._examples[key] = self.spec.kind(task).prepare(self.spec.settled(task), self.spec.place(task, side))
        return self._examples[key]

    def run(self, task: str, on_example: OnExample = lambda _done, _total: None) -> Run:
        """How a task is computed."""
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
        """What the model does on its task's examples; further metrics of the task are its `others`.

        reference: the task's fine-tuned model, which `agreement` compares with; its outputs are kept.
        """
        examples = self.examples(model.task, model.folder)
        if examples.metrics != (AGREEMENT,):
            return self._computed(model, examples, on_example)
        if reference is None:
            raise self.spec.place(model.task, model.folder).error(
                "metric", "`agreement` is with the task's fine-tuned model", hint="checkpoint: path/of/it, or --plan"
            )
        key = (model.task, reference.digest)
        if key not in self._references:
            self._references[key] = self._computed(reference, examples, on_example)
        return _agreement(self._computed(model, examples, on_example), self._references[key])

    def _computed(self, model: TaskModel, examples: Examples, on_example: OnExample) -> Scored:
        task = self.spec.settled(model.task)
        first, *others = self.spec.kind(model.task).score(model, task, examples, self.run(model.task, on_example))
        return replace(first, others=tuple(others))


def score(
    spec: EvalSpec, task: str, model: TaskModel, *, device: str | None = None, reference: TaskModel | None = None
) -> Scored:
    """Score one model on one task of a spec."""
    assert model.task == task
    return Scorer(spec=spec, device=device).score(model, reference=reference)


def _agreement(outputs: Scored, reference: Scored) -> Scored:
    """How often two models say the same, and how far their distributions are apart."""
    agreed = replace(outputs, labels=reference.predictions)
    return replace(agreed, others=(replace(agreed, metric="kl_divergence"),))
