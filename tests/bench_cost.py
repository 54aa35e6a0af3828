"""`python -m tests.bench cost`: Table 3 of the FlexMerge paper, and its reconstruction times, on this machine.

Inference: a batch of 256 images, 32 of each of eight tasks, through a runtime of a bundle, beside one plain model on
the same 256. Reconstruction: every tensor of one task out of bundles of masks of several sizes, beside `load_file` and
a copy. The family is bench_serve.py's of ViT-B/32 size. Times are processor times of the fastest turn.
"""

from collections.abc import Iterator
from pathlib import Path

from tests.bench_serve import (
    FIGURES,
    best_of,
    inputs_of,
    make_family,
    plain_model,
    print_figure,
    run_figure,
    spread,
    torch_inference,
)

BATCH = 256
SIZES = ("average-1x", "average-2.25x", "average-4x", "auto-1x")
MASKED = {"emr": ("3x", "4x", "6x"), "consensus": ("3x", "4x", "6x")}


def batches(bundle: Path, weights: str, device: str) -> dict[str, float]:
    """Seconds of one batch: of one plain model, and of eight tasks."""
    from flexmerge_cli import open_bundle

    runtime = open_bundle(bundle, verify="off").runtime(weights=weights, device=device)
    plain, inputs = plain_model(bundle, device), inputs_of(bundle, BATCH, device)
    tasks = [task for task in runtime.tasks for _ in range(BATCH // len(runtime.tasks))]
    with torch_inference():
        return best_of({"one": lambda: plain(**inputs), "all": lambda: runtime(inputs, tasks)}, device)


def reconstruction(bundle: Path, weights: str, device: str) -> dict[str, float]:
    """Seconds of all tensors of a task, and of `load_file` and a copy; and the bundle's bytes in models."""
    from safetensors.torch import load_file

    from flexmerge_cli import open_bundle

    opened, path = open_bundle(bundle, verify="off"), bundle.parent / "tasks" / "task1" / "model.safetensors"
    found = best_of(
        {
            "load": lambda: {name: value.to(device, copy=True) for name, value in load_file(path).items()},
            "view": lambda: dict(opened.view("task1", copy=True, device=device)),
        },
        device,
    )
    manifest = opened._bundle.manifest
    return found | {"size": manifest.stored_bytes / manifest.one_model_bytes}


FIGURES |= {"batches": batches, "reconstruction": reconstruction}


def cost(folder: Path, device: str) -> Iterator[tuple[str, str]]:
    """What was measured, and the figure."""
    from flexmerge_cli import merge

    root = folder / "vit"
    make_family(root, SIZES)
    for name in SIZES:
        weights = "packed" if name.startswith("auto") else "dense"
        found = run_figure("batches", root / name, weights, device)
        told = f"{found['all']:.1f} s, one model {found['one']:.1f} s: {found['all'] / found['one']:.2f}x"
        yield f"{name} {weights}: 8 tasks x 32", f"{told}, {spread(found)}"
    for method, sizes in MASKED.items():
        for size in sizes:
            bundle = root / f"{method}-{size}"
            if not bundle.exists():
                merge(root / "plan.json", bundle, method=method, size=size, device="cpu")
            found = run_figure("reconstruction", bundle, "dense", device)
            load = found["load"]
            yield (
                f"{method} at {found['size']:.2f}x: reconstruction",
                f"{found['view']:.2f} s, {found['view'] / load:.2f} of load_file ({load:.2f} s), {spread(found)}",
            )


if __name__ == "__main__":
    print_figure()
