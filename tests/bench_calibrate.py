"""`python -m tests.bench calibrate`: processor time and memory of `calibrate` beside bare forward passes.

Two synthetic fine-tunes of a ViT-B/32 for 100 classes (88 M parameters, float32), and 64 pictures each, made once in
the folder. The bare passes load each model with transformers and run it on the same pictures in batches of 32, too.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

NUM_TASKS, NUM_PICTURES, BATCH = 2, 64, 32


def make_calibrated(folder: Path) -> None:
    import numpy as np
    import torch
    import transformers

    from flexmerge_cli import make_plan

    if (folder / "plan.json").exists():
        return
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(patch_size=32, num_labels=100))
    model.save_pretrained(folder / "base")
    lines = ["version: 1", f"batch_size: {BATCH}", "tasks:"]
    for number in range(NUM_TASKS):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.001 * torch.randn(value.shape))
        model.save_pretrained(folder / "tasks" / f"task{number}")
        pictures = np.random.default_rng(number).normal(size=(NUM_PICTURES, 3, 224, 224)).astype(np.float32)
        np.savez(folder / f"task{number}.npz", images=pictures)
        lines.append(f"  task{number}: {{kind: image-classification, data: task{number}.npz}}")
    (folder / "calib.yaml").write_text("\n".join(lines) + "\n")
    make_plan(folder / "base", tasks_of(folder), output=folder / "plan.json", device="cpu", statistics="gram")


def tasks_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted((folder / "tasks").iterdir())}


def bare_passes(folder: Path) -> Callable[[], None]:
    import numpy as np
    import torch
    from transformers import ViTForImageClassification

    torch.set_num_threads(1)

    def run() -> None:
        for name, path in tasks_of(folder).items():
            model = ViTForImageClassification.from_pretrained(path).eval()
            pictures = torch.from_numpy(np.load(folder / f"{name}.npz")["images"])
            with torch.inference_mode():
                for batch in pictures.split(BATCH):
                    model(pixel_values=batch)

    return run


def calibrated(folder: Path, statistics: str) -> Callable[[], None]:
    import torch
    from transformers import ViTForImageClassification

    from flexmerge_cli import calibrate
    from flexmerge_cli.calibration import collect, make

    assert ViTForImageClassification and collect and make
    torch.set_num_threads(1)
    shutil.rmtree(folder / statistics, ignore_errors=True)
    options = {"statistics": statistics, "device": "cpu"}
    return lambda: calibrate(folder / "plan.json", folder / "calib.yaml", folder / statistics, **options)


def told(found: dict[str, dict[str, float]], folder: Path) -> list[tuple[str, str]]:
    """Lines: what, and its figures."""
    model = (folder / "base" / "model.safetensors").stat().st_size
    bare = found["bare-calibrate"]
    lines = [("one model", f"{model / 1e6:.0f} MB")]
    for name, one in found.items():
        ratio = f"{one['cpu'] / bare['cpu']:.2f} of the bare passes"
        lines.append((name, f"{one['cpu']:6.1f} s of a processor, {ratio}; peak {one['peak_bytes'] / 1e6:.0f} MB"))
    for statistics in ("inputs", "fisher"):
        index = json.loads((folder / statistics / "calibration.json").read_text())
        lines.append((f"{statistics}, on disk", f"{index['tasks']['task0']['bytes'] / 1e6:.0f} MB a task"))
    return lines
