"""The digits sample for tests of curves: a plan of three of its tasks, and a spec of two with few images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from flexmerge_cli import load_plan
from flexmerge_cli.evaluation.spec import EvalSpec, read_spec
from flexmerge_cli.formats.plan_file import Plan

from ..program import ROOT, succeeds

DIGITS = ROOT / "samples/digits"
TASKS = ("digit", "parity", "rotation")
SCORED = ("digit", "rotation")


@dataclass(frozen=True, kw_only=True)
class Digits:
    folder: Path

    @property
    def plan_path(self) -> Path:
        return self.folder / "plan.json"

    @property
    def plan(self) -> Plan:
        return load_plan(self.plan_path)

    @property
    def spec_path(self) -> Path:
        return self.folder / "eval.yaml"

    @property
    def spec(self) -> EvalSpec:
        return read_spec(self.spec_path, TASKS)

    def drawn(self, **options: object) -> list[object]:
        """Arguments of the program that draws a curve."""
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return ["curve", self.plan_path, "--spec", self.spec_path, *words]


def write_spec(
    path: Path, tasks: Sequence[str] = SCORED, *, limit: int = 30, of: Sequence[str] = TASKS, **more: object
) -> Path:
    """of: the tasks of the plan; those that are not scored are named as such."""
    fields = {
        task: {"kind": "image-classification", "data": str(DIGITS / f"test/{task}.npz"), **more} for task in tasks
    }
    left_out = [task for task in of if task not in tasks]
    top = {"version": 1, "dtype": "float32", "limit": limit, "not_scored": left_out}
    path.write_text(yaml.safe_dump({**top, "tasks": fields}))
    return path


def digits(folder: Path) -> Digits:
    sources = [word for task in TASKS for word in ("--task", f"{task}={DIGITS / 'tasks' / task}")]
    succeeds("plan", "-q", "--base", DIGITS / "base", *sources, "-o", folder / "plan.json")
    write_spec(folder / "eval.yaml")
    return Digits(folder=folder)
