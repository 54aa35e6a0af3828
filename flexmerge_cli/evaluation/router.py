"""Fits the router of a bundle: a classifier of tasks over features of every task's examples.

The features of an example are the mean of the last hidden states that the backbone of one of the bundle's tasks has for
it. The examples of every task are prepared with that one task's tokenizer or image processor, as inputs of unknown task
will be.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.router import Router
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Examples, Run
from flexmerge_cli.evaluation.kinds.sequences import mean_of_tokens, padded_batch, takes_batches
from flexmerge_cli.evaluation.loading import build_model, require
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.evaluation.scored import TaskModel
from flexmerge_cli.evaluation.spec import EvalSpec
from flexmerge_cli.formats.manifest_records import RouterEntry

KINDS = ("linear", "centroid", "mlp")
TEXTS = ("text-classification", "regression")
IMAGES = ("image-classification",)
FOLDS = 5
HIDDEN = (512, 256)
"""Units of the two hidden layers of `mlp`, as in FREE-Merging's release."""
TEMPERATURES = np.geomspace(0.05, 20, 241)
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRequest:
    """How to make a router."""

    kind: str = "linear"
    features: str | None = None
    """The task whose backbone gives the features; None for the first task."""
    limit: int = 256
    """The largest number of examples of a task."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UsageError for an unknown kind or too few examples."""
        if self.kind not in KINDS:
            raise UsageError(f"`{self.kind}` is no kind of router", hint=f"one of: {', '.join(KINDS)}")
        if self.limit < FOLDS:
            raise UsageError(f"{self.limit} examples of a task are too few", hint=f"at least {FOLDS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureModel:
    """The model that gives the features."""

    model: TaskModel
    built: Any
    run: Run

    @staticmethod
    def of(bundle: Bundle, task: str, run: Run) -> "FeatureModel":
        """Load the model of a task. Raises like `build_model`."""
        model = bundle_model(bundle, task)
        return FeatureModel(model=model, built=build_model(model, run.dtype, run.device), run=run)

    def features(self, spec: EvalSpec, examples: Examples, task: str) -> np.ndarray:
        """Return the features of a task's examples, float32 [n, d]. Raises DataError if one is not finite."""
        import torch

        found, inputs = [], examples.items[0]
        size = self.run.batch_size
        if spec.tasks[task].kind in TEXTS:
            tokenizer, rows = inputs
            size = size if takes_batches(self.built, tokenizer) else 1
        for start in range(0, examples.n, size):
            stop = min(start + size, examples.n)
            with torch.inference_mode():
                if spec.tasks[task].kind in TEXTS:
                    batch = padded_batch(self.built, tokenizer, rows[start:stop])
                else:
                    pixels = inputs.pixels(start, stop, self.model.folder)
                    batch = {"pixel_values": pixels.to(self.built.device, self.built.dtype)}
                found.append(pooled(self.built, batch))
            self.run.on_example(stop, examples.n)
        features = np.concatenate(found)
        if not np.isfinite(features).all():
            raise DataError(
                f"the features that the model of `{self.model.task}` has for examples of `{task}` are not finite",
                hint="choose another task with --features",
            )
        return features


def pooled(built: Any, batch: Mapping[str, Any]) -> np.ndarray:
    """Return the mean over positions of the backbone's last hidden states, float32 [n, d]. Padding does not count."""
    backbone = built.get_encoder() if built.config.is_encoder_decoder else built.base_model
    hidden = backbone(**batch).last_hidden_state.float()
    if hidden.dim() == 4:  # [n, channels, height, width]
        mean = hidden.mean((2, 3))
    elif "attention_mask" in batch:
        mean = mean_of_tokens(hidden, batch["attention_mask"][:, :, None].float())
    else:
        mean = hidden.mean(1)
    found: np.ndarray = mean.cpu().numpy()
    return found


def examples_for_router(
    bundle: Bundle, spec: EvalSpec, task: str, features: str, *, limit: int | None, access: Access = ONLINE
) -> Examples:
    """Read a task's inputs, prepared as those of the task `features`. Labels are not read.

    limit: the largest number of examples; None for what the spec says. Raises UsageError, DataError, SourceError.
    """
    settled = spec.settled(task)
    if settled.kind not in (*TEXTS, *IMAGES):
        raise spec.place(task, bundle.config_folder(task)).error(
            "kind",
            f"a router takes texts and images of classification and regression, and this is {settled.kind}",
            hint="leave the task out",
        )
    changes: dict[str, Any] = {} if settled.kind == "regression" else {"metric": AGREEMENT}
    if settled.kind in TEXTS:
        changes["max_length"] = None  # Nobody knows the task of an input, and so not its own limit either.
    if limit is not None:
        changes["limit"] = min(limit, settled.limit or limit)
    with _side_files(bundle, config=task, rest=features) as side:
        return spec.kind(task).prepare(settled.model_copy(update=changes), spec.place(task, side, access))


@contextmanager
def _side_files(bundle: Bundle, *, config: str, rest: str) -> Iterator[Path]:
    """Yield a folder with the config of one task, and the tokenizer and processor of another."""
    with tempfile.TemporaryDirectory() as folder:
        for task, is_config in ((rest, False), (config, True)):
            for path in bundle.config_folder(task).iterdir():
                if path.is_file() and (path.name == "config.json") == is_config:
                    (Path(folder) / path.name).symlink_to(path.absolute())
        yield Path(folder)


def fit_router(
    bundle: Bundle,
    spec: EvalSpec,
    request: RouterRequest,
    run: Run,
    *,
    access: Access = ONLINE,
    on_step: OnStep = lambda *_step: None,
) -> tuple[Router, RouterEntry]:
    """Fit a router on the examples of every task of a spec. Returns it and its entry in the manifest.

    Its accuracy and temperature are those of cross-validation in 5 folds. The same bundle, examples, request and build
    give the same numbers. Raises UsageError, DataError, SourceError.
    """
    require("sklearn")
    tasks = list(spec.tasks)
    if len(tasks) < 2:
        raise UsageError("a router tells tasks apart, and the spec has one", hint="name at least two tasks in the spec")
    features = request.features if request.features is not None else tasks[0]
    if features not in bundle.tasks:
        raise UsageError(f"--features {features}: no such task", hint=f"one of: {', '.join(bundle.tasks)}")
    examples = {
        task: examples_for_router(bundle, spec, task, features, limit=request.limit, access=access) for task in tasks
    }
    for task, found in examples.items():
        if found.n < FOLDS:
            raise spec.place(task, bundle.config_folder(task)).error(
                "data",
                f"a router needs at least {FOLDS} examples of each task, and here are {found.n}",
                hint="add some",
            )
    model = FeatureModel.of(bundle, features, run)
    x, y = [], []
    for number, task in enumerate(tasks):
        on_step(f"features of {task}", 0, examples[task].n)
        x.append(model.features(spec, examples[task], task))
        y.append(np.full(examples[task].n, number))
    router, accuracy = fit(np.concatenate(x), np.concatenate(y), request)
    entry = RouterEntry(
        kind=cast(Any, request.kind),  # one of KINDS
        features=features,
        tasks=tuple(tasks),
        temperature=router.temperature,
        accuracy=accuracy,
        examples={task: found.n for task, found in examples.items()},
        data={task: found.digest for task, found in examples.items()},
    )
    return router, entry


def fit(x: np.ndarray, y: np.ndarray, request: RouterRequest) -> tuple[Router, float]:
    """Fit a router on features x, float32 [n, d], of tasks y, int [n]. Also returns its accuracy in cross-validation.

    Raises DataError if all features are the same.
    """
    from sklearn.model_selection import StratifiedKFold

    if not np.ptp(x, axis=0).any():
        raise DataError(
            "the examples of all tasks have the same features: nothing tells them apart",
            hint="choose another task with --features, or other examples",
        )
    outputs = np.empty((len(y), len(np.unique(y))))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=request.seed)
    for train, test in folds.split(x, y):
        outputs[test] = _fitted(x[train], y[train], request).outputs(x[test])
    losses = [_loss(outputs / temperature, y) for temperature in TEMPERATURES]
    temperature = float(TEMPERATURES[int(np.argmin(losses))])
    whole = _fitted(x, y, request)
    router = Router(mean=whole.mean, scale=whole.scale, layers=whole.layers, temperature=temperature)
    return router, float((outputs.argmax(1) == y).mean())


def _fitted(x: np.ndarray, y: np.ndarray, request: RouterRequest) -> Router:
    """Fit a router of temperature 1."""
    mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    scale[scale < 1e-6 * max(float(scale.max()), 1e-30)] = 1
    z = (x - mean) / scale
    layers: list[tuple[np.ndarray, np.ndarray]]
    if request.kind == "centroid":
        centres = np.stack([z[y == task].mean(axis=0) for task in np.unique(y)])
        layers = [(centres, -0.5 * (centres**2).sum(axis=1))]
    elif request.kind == "linear":
        from sklearn.linear_model import LogisticRegression

        fitted = LogisticRegression(C=0.1, max_iter=2000).fit(z, y)
        weight, bias = fitted.coef_, fitted.intercept_
        if len(weight) == 1:  # For two tasks, scikit-learn has only the difference.
            weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
        layers = [(weight, bias)]
    else:
        layers = _multilayer(z, y, request.seed)
    arrays = [(weight.astype(np.float32), bias.astype(np.float32)) for weight, bias in layers]
    return Router(mean=mean.astype(np.float32), scale=scale.astype(np.float32), layers=tuple(arrays), temperature=1.0)


def _multilayer(z: np.ndarray, y: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fit a perceptron with three layers of weights, of the sizes that FREE-Merging released.

    Its `SimpleMLP` sees pixels, and has a dropout of 0.5 while it is trained; a second router puts one hidden layer of
    256 units on features of a ResNet-18. How they were trained was not released, so the penalty on the weights and the
    optimiser (Adam) are scikit-learn's.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = MLPClassifier(HIDDEN, alpha=1e-2, max_iter=300, random_state=seed).fit(z, y)
    layers = [(weight.T, bias) for weight, bias in zip(fitted.coefs_, fitted.intercepts_)]
    weight, bias = layers[-1]
    if len(weight) == 1:
        layers[-1] = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    return layers


def _loss(outputs: np.ndarray, y: np.ndarray) -> float:
    """Return the mean negative logarithm of the probability of the right task."""
    top = outputs.max(axis=1)
    total = top + np.log(np.exp(outputs - top[:, None]).sum(axis=1))
    return float((total - outputs[np.arange(len(y)), y]).mean())
