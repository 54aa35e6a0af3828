"""The golden family and cases, read once.

golden/methods-1.* and methods-2.* hold results of an independent reference implementation on golden/family; where the
authors of a method published code, it was run on the same input and agrees to the difference in the file.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.method import Method
from flexmerge_cli.methods.registry import (
    all_calibrations,
    all_methods,
    all_steps,
    make_calibration,
    make_call,
    make_step,
)
from flexmerge_cli.methods.step import CalibrationCall, StepCall

from .driver import Family

# The variant of cases that name none: methods-2 was made when it was the default.
PAPER: Mapping[str, Mapping[str, Any]] = {"fr": {"variant": "paper"}}

GOLDEN = Path(__file__).parents[1] / "golden"
FIRST = json.loads((GOLDEN / "methods-1.json").read_text())
SECOND = json.loads((GOLDEN / "methods-2.json").read_text())
TASKS = tuple(FIRST["tasks"])


@functools.cache
def values(number: int) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"methods-{number}.safetensors")


@functools.cache
def golden_family() -> Family:
    base = load_file(GOLDEN / "family/base/model.safetensors")
    models = [load_file(GOLDEN / f"family/tasks/{task}/model.safetensors") for task in TASKS]
    blocks = json.loads((GOLDEN / "order.json").read_text())["blocks"]
    return Family(
        tasks=TASKS,
        deltas={name: torch.stack([model[name] - base[name] for model in models]) for name in sorted(base)},
        blocks={
            block: tuple(sorted(name for name in base if name == block or name.startswith(f"{block}.")))
            for block in blocks
        },
    )


def first_case(name: str) -> tuple[Call, list[StepCall]]:
    """Make the call and the steps of a case of methods-1.json."""
    case = FIRST["cases"][name]
    args = dict(case["arguments"])
    if case["method"] == "pcb" and args["scope"] == "model":  # of the authors, not of FlexMerge's release
        args["scope"] = "whole"
    steps = [dict(step) for step in case["steps"]]
    return make_call(all_methods()[case["method"]], args), [
        make_step(all_steps()[step.pop("step")], step) for step in steps
    ]


def second_case(case: Mapping[str, Any]) -> tuple[Call, list[StepCall], CalibrationCall | None]:
    """Make the calls of a methods-2.json case: its `prefilter` is our step fr, its `calibrate` our calibration svc."""
    args = PAPER.get(case["method"], {}) | case["arguments"]
    prefilter, calibrate = args.pop("prefilter", None), args.pop("calibrate", None)
    return (
        make_call(all_methods()[case["method"]], args),
        [make_step(all_steps()["fr"], prefilter)] if prefilter is not None else [],
        make_calibration(all_calibrations()["svc"], calibrate) if calibrate is not None else None,
    )


def is_merging(name: str) -> bool:
    """Whether a method of this name is called with task vectors; those with residuals are declarations (coded.py)."""
    method = all_methods().get(name)
    return method is not None and type(method) is Method
