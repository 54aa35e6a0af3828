"""Coded methods against an independent float64 reference: decoded task vectors, and the bytes of every part.

golden/methods-2.json lists the cases, methods-2.safetensors their values, which are all of task vectors.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from flexmerge_cli.methods import coded, free
from flexmerge_cli.methods.fr import Magnitudes
from flexmerge_cli.methods.method import Where
from flexmerge_cli.methods.registry import make_call
from flexmerge_cli.residuals.coder import num_bytes

GOLDEN = Path(__file__).parents[1] / "golden"
VALUES = load_file(GOLDEN / "methods-2.safetensors")
BLOCKS = json.loads((GOLDEN / "auto.json").read_text())["partitions"]
METHODS = {
    method.name: method
    for method in (*vars(coded).values(), *vars(free).values())
    if isinstance(method, coded.CodedMethod)
}
CASES = {
    f"{case_id}/{group}": (case, case["groups"][group], f"{case_id}/{group}", group)
    for case_id, case in json.loads((GOLDEN / "methods-2.json").read_text())["cases"].items()
    if case["method"] in METHODS
    for group in case["groups"]
}


@pytest.fixture(scope="module")
def family():
    """Task vectors by task and tensor."""
    base = load_file(GOLDEN / "family/base/model.safetensors")
    tasks = {path.name: load_file(path / "model.safetensors") for path in (GOLDEN / "family/tasks").iterdir()}
    return {task: {name: model[name] - base[name] for name in base} for task, model in tasks.items()}


@pytest.mark.parametrize("case", CASES)
def test_decoded_task_vectors_are_golden(family, case):
    golden, group, prefix, group_id = CASES[case]
    stored = declare(golden)
    for tensor in group["bytes"]:
        deltas = stack(family, group["tasks"], tensor)
        form = stored.form(tensor, deltas.shape[1:], ("F32",) * len(deltas))
        centre = centre_delta(stored.centre_call() or stored.centre, family, group, group_id, tensor)
        for task in ("cars", "svhn"):
            number = group["tasks"].index(task)
            if form.residual is None:
                decoded = deltas[number]
            else:
                residual = deltas[number] - centre
                if stored.expert:
                    factor = expert_factors(stored.expert, family, group["tasks"], tensor)[number]
                    residual = stored.expert.residual(deltas[number], torch.zeros_like(centre), centre, factor)
                parts = form.residual.encode(residual.reshape(form.matrix), "F32")
                decoded = centre.numpy() + form.residual.decode(parts, form.matrix, "F32").reshape(centre.shape)
            expected = VALUES[f"{prefix}/{tensor}/{task}"]
            tolerance = golden["tolerance"]["relative_to_max"] * np.abs(expected).max()
            assert np.abs(np.asarray(decoded) - expected).max() <= tolerance


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_golden(family, case):
    golden, group, _, _ = CASES[case]
    stored, dtypes = declare(golden), ("F32",) * len(group["tasks"])
    for tensor, sizes in group["bytes"].items():
        form = stored.form(tensor, family["cars"][tensor].shape, dtypes)
        each = num_bytes(form.residual.parts(form.matrix, "F32")) if form.residual else family["cars"][tensor].nbytes
        found = {"centre": stored.centre_bytes(form, dtypes), "per_task": each, "whole": form.residual is None}
        assert found == sizes
    assert sum(stored_bytes(stored, *named, dtypes) for named in family["cars"].items()) == group["bytes_model"]


@pytest.mark.parametrize("case", CASES)
def test_parts_are_as_they_were_billed(family, case):
    golden, group, _, _ = CASES[case]
    for tensor in group["bytes"]:
        delta = torch.from_numpy(family["svhn"][tensor])
        form = declare(golden).form(tensor, delta.shape, ("BF16",) * len(group["tasks"]))
        if form.residual is None:
            continue
        billed = form.residual.parts(form.matrix, "BF16")
        parts = form.residual.encode(delta.reshape(form.matrix), "BF16")
        assert {role: (part.shape, part.nbytes) for role, part in parts.items()} == {
            part.role: (part.shape, part.num_bytes) for part in billed
        }
        assert list(parts) == [part.role for part in billed]


def declare(golden):
    args = dict(golden["arguments"])
    if golden["method"] == "free":  # the file was made when `paper` was the default, and `coef` that of the variant
        args = {"variant": "paper", "coef": "align" if args.get("variant") == "code" else "eq3"} | args
    return coded.declare(make_call(METHODS[golden["method"]], args))


def stack(family, tasks, tensor):
    return torch.from_numpy(np.stack([family[task][tensor] for task in tasks]))


def stored_bytes(stored, tensor, delta, dtypes):
    form = stored.form(tensor, delta.shape, dtypes)
    if form.residual is None:
        return len(dtypes) * delta.nbytes
    return stored.centre_bytes(form, dtypes) + coded.residual_bytes(form, dtypes)


def where(tensor, shape, tasks):
    return Where(tasks=tuple(tasks), tensor=tensor, start=0, shape=tuple(shape))


def of_scope(family, scope, tensor):
    """Names of all tensors of a scope, sorted."""
    names = sorted(family["cars"])
    block = next(block for block in BLOCKS if tensor == block or tensor.startswith(f"{block}."))
    within = {"tensor": tensor, "block": block, "model": ""}[scope]
    return [name for name in names if name == within or name.startswith(f"{within}." if within else "")]


def centre_delta(centre, family, group, group_id, tensor):
    """float32 [*shape], as a centre is rounded before residuals are taken against it."""
    deltas = stack(family, group["tasks"], tensor)
    if centre == "base":
        return torch.zeros_like(deltas[0])
    if centre.method.name == "tsv_m":  # whose own golden values leave its rounding out of this comparison
        return torch.from_numpy(VALUES[f"tsv_m/{group_id}/{tensor}"])
    stats = None
    if centre.statistics is not None:
        names = of_scope(family, centre.args["scope"], tensor)
        sums = [[np.abs(family[task][name]).sum(dtype=np.float64) for name in names] for task in group["tasks"]]
        stats = Magnitudes(np.array(sums).sum(1))
    shape = deltas.shape[1:]
    if centre.scope_of(tensor, shape) == "element":
        deltas = deltas.flatten(1)
    return centre(deltas, where(tensor, shape, group["tasks"]), stats).float().reshape(shape)


def expert_factors(expert, family, tasks, tensor):
    total = None
    for name in of_scope(family, expert.scope, tensor):
        deltas = stack(family, tasks, name)
        found = expert.measure(deltas.flatten(1), where(name, deltas.shape[1:], tasks))
        total = found if total is None else expert.combine(total, found)
    return expert.factors(expert.finish(total))
