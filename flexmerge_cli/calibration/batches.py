"""Observes what models get of the examples, and gives it back in batches that a seed draws."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.calibration.collect import example_of
from flexmerge_cli.calibration.request import CalibrationRequest, run_examples
from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation.scored import TaskModel
from flexmerge_cli.random import key64, uniform

Example = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a model, of one example."""


def seen_examples(
    request: CalibrationRequest, model: TaskModel, on_built: Callable[[Any, Mapping[str, str]], None]
) -> tuple[list[Example], str]:
    """Run a task's model on its examples. Returns what it gets, one by one, and the digest of the examples.

    on_built: gets the model, and the name in its state -> name among the weights of each tensor.
    """
    seen: list[Example] = []
    hooks: list[Any] = []

    def observed(built: Any, names: Mapping[str, str]) -> None:
        on_built(built, names)
        hook = built.register_forward_pre_hook(
            lambda _module, args, kwargs: seen.extend(_divided(args, kwargs)), with_kwargs=True
        )
        hooks.append(hook)

    digest = run_examples(request, model, on_built=observed).digest
    for hook in hooks:
        hook.remove()
    return seen, digest


def drawn(examples: list[Example], step: int, batch_size: int, seed: int, task: str) -> list[Example]:
    """Return the examples of one step. Each is used once before any is used again, in an order that the seed draws."""
    n = len(examples)
    size, key, found = min(batch_size, n), key64("flexmerge/tune/1", seed, task), []
    for number in range(step * size, (step + 1) * size):
        epoch, place = divmod(number, n)
        found.append(examples[int(np.argsort(uniform(key, epoch * n, n), kind="stable")[place])])
    return found


def not_finite(what: str) -> DataError:
    return DataError(
        f"{what} of the merged model are not finite", hint="check the data, or give the spec `dtype: float32`"
    )


def _divided(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Example]:
    """Divide what a model gets into examples."""
    n = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    with torch.inference_mode(False):  # Clones made here can take part in gradients.
        return [
            (
                tuple(example_of(value, place, n) for value in args),
                {name: example_of(value, place, n) for name, value in kwargs.items()},
            )
            for place in range(n)
        ]


def stacked(batch: list[Example]) -> list[tuple[tuple[Any, ...], dict[str, Any], float]]:
    """Stack examples of equal shapes. Returns arguments, and the part of the batch that they are."""
    alike: dict[Any, list[Example]] = {}
    for args, kwargs in batch:
        shapes = [tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        alike.setdefault((tuple(kwargs), tuple(shapes)), []).append((args, kwargs))

    def joined(values: list[Any]) -> Any:
        return torch.cat(values) if isinstance(values[0], Tensor) and values[0].ndim else values[0]

    return [
        (
            tuple(joined([args[place] for args, _ in group]) for place in range(len(group[0][0]))),
            {name: joined([kwargs[name] for _, kwargs in group]) for name in group[0][1]},
            len(group) / len(batch),
        )
        for group in alike.values()
    ]
