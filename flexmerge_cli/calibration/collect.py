"""Measures one model while it runs on its examples: inputs and outputs of its layers, and its Fisher information.

A Wanted is one array of the file; `measuring` observes any number of them in one run. This module knows the modules of
a model, but neither kinds of tasks nor files. It holds the sums of this run's Wanted and, for the Fisher information,
the gradient of one tensor at a time and the activations of one example.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flexmerge_cli.errors import DataError
from flexmerge_cli.formats.calibration import InputLayout, Statistic, half_size, inputs_of
from flexmerge_cli.random import key64, uniform

TILE = 96
"""The most rows of a tile on the diagonal of a symmetric sum, of which nearly a half is computed in vain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One array that is to be measured."""

    tensor: str
    statistic: Statistic
    module: str
    """The path of the layer in the model or, for `fisher`, of the parameter."""
    layout: InputLayout | None
    shape: tuple[int, ...]
    """The shape of the weight."""

    @property
    def num_elements(self) -> int:
        if self.statistic == "fisher":
            return int(np.prod(self.shape, dtype=np.int64))
        assert self.layout is not None
        if self.statistic == "outputs":
            return self.shape[1] if self.layout == "conv1d" else self.shape[0]
        n = inputs_of(self.layout, self.shape)
        return n if self.layout == "embedding" else half_size(n)


@dataclass(slots=True, kw_only=True)
class CollectedArray:
    """One array that was measured."""

    wanted: Wanted
    count: int
    """The number of input rows, or examples, that it is the mean of."""
    array: np.ndarray
    """float32, flat."""
    of: str | None = None
    """An earlier tensor that got the same inputs; the array is then empty."""


def layout_of(module: nn.Module) -> InputLayout | None:
    """Return the layout of a layer's weight; None for a module whose inputs are not measured."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
    return "conv2d" if plain and not isinstance(module.padding, str) else None


@contextmanager
def measuring(
    model: nn.Module, wanted: Sequence[Wanted], *, task: str, seed: int
) -> Iterator[Callable[[], list[CollectedArray]]]:
    """Observe the layers of a model that runs inside the block. Yields a function that returns the results.

    The results are in the order of wanted. task, seed: they seed the drawing of labels. Raises DataError if two layers
    have the same inputs only at first.
    """
    inputs = _Inputs()
    outputs: dict[str, tuple[Tensor, int]] = {}
    gradients = _Fisher(
        model, [one for one in wanted if one.statistic == "fisher"], key64("flexmerge/fisher/1", seed, task)
    )
    modules = dict(model.named_modules())
    with ExitStack() as hooks:
        for one in wanted:
            if one.statistic == "inputs":
                module = modules[one.module]
                hooks.callback(module.register_forward_pre_hook(inputs.hook(one, module), with_kwargs=True).remove)
            if one.statistic == "outputs":
                hooks.callback(modules[one.module].register_forward_hook(_summing(outputs, one)).remove)
        if gradients.wanted:
            hooks.enter_context(gradients)

        def found() -> list[CollectedArray]:
            return [
                inputs.found(one)
                if one.statistic == "inputs"
                else gradients.found(one)
                if one.statistic == "fisher"
                else _mean_outputs(outputs, one)
                for one in wanted
            ]

        yield found


@dataclass(slots=True)
class _Symmetric:
    """The sum of xᵀx in float32: its lower triangle, in tiles."""

    n: int
    tiles: list[tuple[slice, slice, Tensor]]
    count: int = 0

    @staticmethod
    def zeros(n: int, device: torch.device) -> "_Symmetric":
        tiles = [
            (rows, columns, torch.zeros(rows.stop - rows.start, columns.stop - columns.start, device=device))
            for rows, columns in _tiles(0, n)
        ]
        return _Symmetric(n, tiles)

    def add(self, x: Tensor) -> None:
        """Add the products of x, float32 [rows, n]."""
        for rows, columns, total in self.tiles:
            total.addmm_(x[:, rows].T, x[:, columns])
        self.count += len(x)

    def mean(self) -> np.ndarray:
        """Return the lower triangle, row by row."""
        found = np.empty(half_size(self.n), np.float32)
        for rows, columns, total in self.tiles:
            tile = (total / max(1, self.count)).cpu().numpy()
            for row, values in enumerate(tile, rows.start):
                stop = min(columns.stop, row + 1)
                first = half_size(row)
                found[first + columns.start : first + stop] = values[: stop - columns.start]
        return found


def _tiles(start: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of tiles that cover a lower triangle: as few and as large as halving makes them."""
    if stop - start <= TILE:
        yield slice(start, stop), slice(start, stop)
        return
    middle = (start + stop) // 2
    yield slice(middle, stop), slice(start, middle)
    yield from _tiles(start, middle)
    yield from _tiles(middle, stop)


@dataclass(slots=True)
class _Inputs:
    """Sums over inputs. Consecutive layers that get the very same tensor, such as q, k and v, share one sum."""

    sums: dict[str, _Symmetric | Tensor] = field(default_factory=dict)
    of: dict[str, str | None] = field(default_factory=dict)
    """Maps each tensor to the one whose sum it shares; None for a tensor with a sum of its own."""
    last: tuple[Any, str] | None = None
    """The inputs of the latest call, and the tensor whose sum they were added to."""
    calls: Counter[str] = field(default_factory=Counter)
    """How often the layer of each tensor ran."""

    def hook(self, one: Wanted, module: nn.Module) -> Callable[..., None]:
        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if torch.is_grad_enabled():  # The pass for the Fisher information does not count as inputs.
                return
            if one.layout == "embedding":
                counts = torch.bincount(x.flatten(), minlength=one.shape[0]).double()
                known = self.sums.get(one.tensor)
                self.sums[one.tensor] = counts + known if isinstance(known, Tensor) else counts
                return
            self.calls[one.tensor] += 1
            current = self.last[1] if self.last is not None and self.last[0] is x else None
            owner = self.of.setdefault(one.tensor, current)
            if owner is not None:
                if owner != current:
                    raise _not_shared(one.tensor, owner)
                return
            self.last = x, one.tensor
            rows = _rows(x, module, one)
            if one.tensor not in self.sums:
                self.sums[one.tensor] = _Symmetric.zeros(rows.shape[1], rows.device)
            total = self.sums[one.tensor]
            assert isinstance(total, _Symmetric)
            total.add(rows)

        return observe

    def found(self, one: Wanted) -> CollectedArray:
        owner = self.of.get(one.tensor)
        total = self.sums.get(owner or one.tensor)
        if isinstance(total, Tensor):
            count = int(total.sum())
            array = (total / max(1, count)).float().cpu().numpy()
            return CollectedArray(wanted=one, count=count, array=array)
        if total is None:  # The layer never ran.
            return CollectedArray(wanted=one, count=0, array=np.zeros(one.num_elements, np.float32))
        if owner is not None:
            if self.calls[one.tensor] != self.calls[owner]:
                raise _not_shared(one.tensor, owner)
            return CollectedArray(wanted=one, count=total.count, array=np.zeros(0, np.float32), of=owner)
        return CollectedArray(wanted=one, count=total.count, array=total.mean())


def _not_shared(tensor: str, owner: str) -> DataError:
    return DataError(
        f"the layers of `{owner}` and `{tensor}` had the same inputs at first, but not always",
        hint="measure no inputs: --statistics fisher",
    )


def _rows(x: Tensor, module: nn.Module, one: Wanted) -> Tensor:
    """Return the inputs of a layer, float32 [rows, n]; for a convolution, its patches, channels first."""
    x = x.detach().float()
    if one.layout != "conv2d":
        return x.reshape(-1, inputs_of(one.layout or "linear", one.shape))
    assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
    patches = nn.functional.unfold(
        x, module.kernel_size, dilation=module.dilation, padding=module.padding, stride=module.stride
    )
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _summing(outputs: dict[str, tuple[Tensor, int]], one: Wanted) -> Callable[..., None]:
    axis = 1 if one.layout == "conv2d" else -1

    def observe(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            return
        rows = output.detach().double().movedim(axis, -1).flatten(0, -2)
        total, count = outputs.get(one.tensor, (torch.zeros(rows.shape[1]).to(rows), 0))
        outputs[one.tensor] = total + rows.sum(0), count + len(rows)

    return observe


def _mean_outputs(outputs: Mapping[str, tuple[Tensor, int]], one: Wanted) -> CollectedArray:
    if one.tensor not in outputs:
        return CollectedArray(wanted=one, count=0, array=np.zeros(one.num_elements, np.float32))
    total, count = outputs[one.tensor]
    return CollectedArray(wanted=one, count=count, array=(total / count).float().cpu().numpy())


class _Fisher:
    """The sum over examples of (∂ log p(y|x) / ∂θ)², y drawn from the model. Every call of the model adds to it."""

    def __init__(self, model: nn.Module, wanted: Sequence[Wanted], key: int) -> None:
        self.model, self.wanted, self.key = model, wanted, key
        self.sums: dict[str, Tensor] = {}
        self.num_examples = self.num_drawn = 0
        self._is_inside = False
        self._hooks = ExitStack()

    def __enter__(self) -> "_Fisher":
        own = {one.module: one.tensor for one in self.wanted}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in own)
            if name in own:
                self.sums[own[name]] = torch.zeros_like(parameter, dtype=torch.float32)
                handle = parameter.register_post_accumulate_grad_hook(self._adding(own[name]))  # type: ignore[no-untyped-call]
                self._hooks.callback(handle.remove)
        self._hooks.callback(self.model.register_forward_pre_hook(self._observe, with_kwargs=True).remove)
        return self

    def __exit__(self, *_error: object) -> None:
        self._hooks.close()

    def _adding(self, tensor: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.sums[tensor].add_(parameter.grad.float().square())
            parameter.grad = None

        return add

    def _observe(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_inside:
            return
        self._is_inside = True
        try:
            size = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            for place in range(size):
                # A clone made here is not an inference tensor, so gradients can flow through what is computed from it.
                with torch.inference_mode(False), torch.enable_grad():
                    one = {name: example_of(value, place, size) for name, value in kwargs.items()}
                    likelihood = self._likelihood(
                        self.model(*(example_of(value, place, size) for value in args), **one)
                    )
                    likelihood.backward()  # type: ignore[no-untyped-call]
                self.num_examples += 1
        finally:
            self._is_inside = False

    def _likelihood(self, output: Any) -> Tensor:
        """Return log p(y|x) for labels drawn from the model.

        Logits are [1, classes], or [1, tokens, vocabulary], where every position draws the next token. If the output is
        one number, return that number: for a normal distribution of variance 1, the square of its gradient is the mean
        over what would be drawn.
        """
        logits: Tensor = output.logits.float().flatten(0, -2)
        if logits.shape[1] == 1:
            return logits.sum()
        each = torch.log_softmax(logits, -1)
        numbers = torch.from_numpy(uniform(self.key, self.num_drawn, len(each)))
        self.num_drawn += len(each)
        # On the CPU and in float64, so that every device draws the same from the same logits.
        edges = each.detach().cpu().double().exp().cumsum(-1)
        drawn = torch.searchsorted(edges, numbers[:, None] * edges[:, -1:]).clamp_(max=edges.shape[1] - 1)
        return each.gather(-1, drawn.to(each.device)).sum()

    def found(self, one: Wanted) -> CollectedArray:
        count = max(1, self.num_examples)
        return CollectedArray(
            wanted=one, count=self.num_examples, array=(self.sums[one.tensor] / count).flatten().cpu().numpy()
        )


def example_of(value: Any, place: int, size: int) -> Any:
    """Return one example of a batch."""
    is_batch = isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
    return value[place : place + 1].clone() if is_batch else value
