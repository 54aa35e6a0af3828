"""All tasks' models on one set of merged weights, with their examples: what is tuned by gradients.

The merged weights are θ_base + Σ_k w_k τ_k / M with a weight per task and block. In memory are the merged weights and
their gradient, the task vectors of all M tasks, every task's own tensors, and the examples as the models get them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.calibration.batches import Example, drawn, not_finite, seen_examples, stacked
from flexmerge_cli.calibration.request import CalibrationRequest
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.split import whole_of
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.plan_records import PlanTensor


@dataclass(slots=True, kw_only=True)
class _Shared:
    """One tensor that merges: a parameter of the models, or a part of one."""

    block: int
    base: Tensor
    """float32."""
    deltas: dict[int, Tensor]
    """The task vector of each task that has it, float32."""
    merged: Tensor
    """What the models compute with, in their dtype."""
    gradient: Tensor
    """float32; the sum of what was added since `clear`."""


@dataclass(slots=True)
class JointModels:
    """The models of a plan's tasks, which share the merged weights."""

    plan: Plan
    seed: int
    models: list[Any] = field(default_factory=list)
    examples: list[list[Example]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    """The digest of each task's examples."""
    _shared: dict[str, _Shared] = field(default_factory=dict)
    _wholes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Merged weights and gradients as the models have them, by the plan's names of whole tensors."""

    @staticmethod
    def of(request: CalibrationRequest, on_task: Callable[[int, int], None] = lambda *_step: None) -> "JointModels":
        """Run each task's model once, to see what it gets, and keep it. Raises DataError if sources have changed."""
        found = JointModels(request.plan, request.seed)
        for task in request.plan.all_tasks:
            on_task(task, len(request.plan.tasks))
            found._add(task, request)
        return found

    @property
    def num_tasks(self) -> int:
        return len(self.plan.tasks)

    @property
    def elements_B(self) -> np.ndarray:
        """The number of elements of each block that merge, float64 [blocks]."""
        found = np.zeros(len(self.plan.blocks))
        for shared in self._shared.values():
            found[shared.block] += shared.base.numel()
        return found

    def _add(self, task: int, request: CalibrationRequest) -> None:
        own = request.references.of(self.plan.task_names[task])
        tuned, base = own["fine_tuned"](), own["base"]()
        built: list[tuple[Any, Mapping[str, str]]] = []

        def on_built(model: Any, names: Mapping[str, str]) -> None:
            built.append((model, names))

        seen, digest = seen_examples(request, base, on_built=on_built)
        self.digests.append(digest)
        (model, names), *_ = built
        self._share(task, model, names, tuned.weights, base.weights)
        self.models.append(model)
        self.examples.append(seen)

    def _share(
        self,
        task: int,
        model: Any,
        names: Mapping[str, str],
        tuned: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
    ) -> None:
        """Let a task's model compute with the merged weights, and note its task vectors."""
        merging: dict[str, list[PlanTensor]] = {}
        for tensor in self.plan.tensors:
            has = tensor.class_ is TensorClass.MERGEABLE and task in tensor.present
            if has and self.plan.rows_of(tensor.name, task) is None:
                merging.setdefault(self.plan.whole_name(task, tensor.name), []).append(tensor)
        for name, parameter in model.named_parameters():
            own = names.get(name, "")
            parameter.requires_grad_(own in merging)
            if own not in merging:
                continue
            whole = whole_of(merging[own][0].name)[0]
            if whole not in self._wholes:
                self._wholes[whole] = parameter.detach().clone(), torch.zeros_like(parameter, dtype=torch.float32)
            merged, gradient = self._wholes[whole]
            if merged.shape != parameter.shape:
                parameter.requires_grad_(False)
                continue
            parameter.data = merged
            parameter.register_post_accumulate_grad_hook(_adding(gradient))
            for tensor in merging[own]:
                self._note(task, tensor, merged, gradient, tuned[own].to(merged.device), base[own].to(merged.device))

    def _note(
        self, task: int, tensor: PlanTensor, merged: Tensor, gradient: Tensor, tuned: Tensor, base: Tensor
    ) -> None:
        split, part = self.plan.split(tensor.name), whole_of(tensor.name)[1]

        def part_of(value: Tensor) -> Tensor:
            return value if split is None or part is None else value.chunk(split.parts, split.dim)[part]

        if tensor.name not in self._shared:
            block = next(place for place, one in enumerate(self.plan.blocks) if tensor.name in one.tensors)
            start = part_of(base).float().clone()
            self._shared[tensor.name] = _Shared(
                block=block, base=start, deltas={}, merged=part_of(merged), gradient=part_of(gradient)
            )
        shared = self._shared[tensor.name]
        shared.deltas[task] = part_of(tuned).float() - shared.base

    # Computing

    def merge(self, weight_MB: np.ndarray) -> None:
        """Set the merged weights. weight_MB: float64 [tasks, blocks]."""
        for shared in self._shared.values():
            value = shared.base.clone()
            for task, delta in shared.deltas.items():
                value.add_(delta, alpha=float(weight_MB[task, shared.block]) / self.num_tasks)
            shared.merged.copy_(value)

    def gradient(self, loss: Callable[[Tensor], Tensor], step: int, batch_size: int) -> tuple[np.ndarray, float]:
        """Return ∂/∂w of the sum over tasks of a loss, float64 [tasks, blocks], and that sum.

        loss: maps logits [n, …, classes] to a mean. step: says which examples are used; each is used once before any
        is used again, in an order that the seed draws. Raises DataError if loss or gradient are not finite.
        """
        total = 0.0
        for _, gradient in self._wholes.values():
            gradient.zero_()
        for task, model in enumerate(self.models):
            batch = drawn(self.examples[task], step, batch_size, self.seed, self.plan.task_names[task])
            with torch.enable_grad():
                for args, kwargs, part in stacked(batch):
                    value = loss(model(*args, **kwargs).logits.float()) * part
                    if value.requires_grad:  # Nothing that this model computes with may merge.
                        value.backward()  # type: ignore[no-untyped-call]
                    total += float(value.detach())
            if not np.isfinite(total):
                raise not_finite(f"task `{self.plan.task_names[task]}`: the outputs")
        found = np.zeros((self.num_tasks, len(self.plan.blocks)))
        for shared in self._shared.values():
            gradient = shared.gradient.flatten().double()
            for task, delta in shared.deltas.items():
                found[task, shared.block] += float(gradient @ delta.flatten().double()) / self.num_tasks
        if not np.isfinite(found).all():
            raise not_finite("the gradients")
        return found, total


def _adding(total: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return add
