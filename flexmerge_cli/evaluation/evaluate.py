"""Score every task of a bundle on its own routed view, and its fine-tuned model beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.view import View, load_model
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.image_classification import hits, read_images
from flexmerge_cli.evaluation.spec import EvalSpec

FORMAT = "flexmerge.eval/1"


def evaluate(
    bundle: Bundle, spec: EvalSpec, *, on_task: Callable[[str, int, int], None] = lambda *_step: None
) -> dict[str, Any]:
    """One record per task: metric, n, score with its 95 % Wilson interval, the fine-tuned model's score, bytes.

    One model is in memory at a time. Raises UsageError without transformers, DataError for data that do not fit.
    """
    try:
        import scipy.stats  # noqa: F401
        import transformers
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed", hint="pip install 'flexmerge-cli[eval]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    records: dict[str, Any] = {}
    for done, (name, task) in enumerate(spec.tasks.items()):
        on_task(name, done, len(spec.tasks))
        images, labels = read_images(spec.data_path(name), task.limit)
        model = _computing_in(spec.dtype, load_model(View(bundle, name)))
        merged = hits(model, bundle.path / "tasks" / name, images, labels, spec.batch_size)
        del model
        record = {"metric": "accuracy", "n": len(labels), **_score("merged", merged), "fine_tuned": None}
        path = spec.checkpoint_path(name)
        if path is not None:
            own = _computing_in(spec.dtype, _fine_tuned(path))
            record |= _score("fine_tuned", hits(own, path, images, labels, spec.batch_size))
            record["normalised"] = record["merged"] / record["fine_tuned"] if record["fine_tuned"] else None
        record["route_bytes"] = sum(bundle.manifest.files[file].bytes for file in bundle.route(name))
        records[name] = record
    known = [record["normalised"] for record in records.values() if record.get("normalised") is not None]
    return {
        "format": FORMAT,
        "bundle": bundle.manifest.id,
        "stored_bytes": bundle.manifest.stored_bytes,
        "factor": bundle.manifest.stored_bytes / max(1, bundle.manifest.one_model_bytes),
        "tasks": records,
        "mean": {
            "merged": float(np.mean([record["merged"] for record in records.values()])),
            "normalised": float(np.mean(known)) if len(known) == len(records) else None,
        },
    }


def _fine_tuned(path: Path) -> Any:
    """The task's own model, by the class that its config names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    model_class = getattr(transformers, (config.architectures or ["AutoModelForImageClassification"])[0])
    return model_class.from_pretrained(path).eval()


def _computing_in(dtype: str | None, model: Any) -> Any:
    """bfloat16 on a CPU that cannot compute in it is several times slower than float32."""
    import torch

    return model if dtype is None else model.to(getattr(torch, dtype))


def _score(name: str, hit: np.ndarray) -> dict[str, Any]:
    from scipy.stats import binomtest

    interval = binomtest(int(hit.sum()), len(hit)).proportion_ci(0.95, method="wilson")
    return {name: float(hit.mean()), f"{name}_interval": [float(interval.low), float(interval.high)]}
