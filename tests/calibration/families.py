"""Tiny real models with a plan and a spec of examples: image classifiers, and decoders whose layers are Conv1D."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from flexmerge_cli import load_plan, make_plan
from flexmerge_cli.formats.calibration import CalibrationData, read_calibration
from flexmerge_cli.formats.plan_file import Plan

from ..evaluation import tiny

TASKS = ("a", "b", "c")
NUM_EXAMPLES = 6


@dataclass(frozen=True)
class Calibrated:
    """A family: `base/`, `tasks/NAME/`, plan.json, calib.yaml."""

    folder: Path

    @property
    def plan_path(self) -> Path:
        return self.folder / "plan.json"

    @property
    def spec(self) -> Path:
        return self.folder / "calib.yaml"

    @property
    def plan(self) -> Plan:
        return load_plan(self.plan_path)

    def command(self, output: Path, *options: object) -> list[object]:
        return ["calibrate", self.plan_path, "--spec", self.spec, "-o", output, "--device", "cpu", *options]

    def read(self, output: Path) -> CalibrationData:
        return read_calibration(output, self.plan)

    def weights(self, task: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "tasks" / task / "model.safetensors")


def family(folder: Path, make: Callable[[Path], Path], kind: str, **fields: object) -> Calibrated:
    """Three tasks that differ from the base a little, each with a data file NAME.* that the caller writes."""
    base = make(folder / "base")
    state = load_file(base / "model.safetensors")
    for number, task in enumerate(TASKS):
        make(folder / "tasks" / task)
        generator = torch.Generator().manual_seed(number)
        changed = {name: v + 0.1 * torch.randn(v.shape, generator=generator) for name, v in state.items()}
        save_file(changed, folder / "tasks" / task / "model.safetensors", metadata={"format": "pt"})
    make_plan(base, {task: folder / "tasks" / task for task in TASKS}, output=folder / "plan.json")
    ending = fields.pop("ending")
    tasks = {task: {"kind": kind, "data": f"{task}{ending}", **fields} for task in TASKS}
    (folder / "calib.yaml").write_text(yaml.safe_dump({"version": 1, "dtype": "float32", "tasks": tasks}))
    return Calibrated(folder)


def images(folder: Path) -> Calibrated:
    for number, task in enumerate(TASKS):
        rng = np.random.default_rng(number)
        np.savez(folder / f"{task}.npz", images=rng.integers(0, 256, (NUM_EXAMPLES, 3, 8, 8)).astype(np.uint8))
    return family(folder, tiny.vit, "image-classification", ending=".npz")


def texts(folder: Path) -> Calibrated:
    for number, task in enumerate(TASKS):
        tiny.rows(folder / f"{task}.jsonl", text=tiny.sentences(NUM_EXAMPLES, number))
    return family(folder, tiny.gpt2, "causal-lm", ending=".jsonl")
