"""The whole path, plan -> merge -> view, against an independent reference implementation.

golden/methods-1.* hold the unified deltas of the family in golden/family, one group of all tasks, float32; and for
methods with masks the deltas that two of the tasks get back. golden/order.json holds merge orders and sizes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flexmerge_cli import load_plan, make_plan, open_bundle
from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.errors import GateError
from flexmerge_cli.methods.use import parse_use
from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.order.order import Strategy
from flexmerge_cli.order.similarity import Similarity
from flexmerge_cli.planning.make import replan
from flexmerge_cli.request.choices import Fit
from flexmerge_cli.request.plan import OrderSettings
from flexmerge_cli.request.size import parse_size

from .program import succeeds

GOLDEN = Path(__file__).parent / "golden"
METHODS = json.loads((GOLDEN / "methods-1.json").read_text())
ORDER = json.loads((GOLDEN / "order.json").read_text())
TASKS = METHODS["tasks"]
TENSORS = METHODS["tensors"]
PLAIN = ("average", "task_arithmetic_mean", "task_arithmetic_sum", "ties_model", "ties_model_k30", "ties_model_sum",
         "ties_model_max", "ties_block", "ties_tensor", "ties_k100")  # fmt: skip
MASKED = ("emr_weighted", "emr_tensor_mean", "consensus_ties", "consensus_ties_released", "consensus_task_arithmetic")
STORED = ("cars", "svhn")  # of masked methods the file has these two tasks


@pytest.fixture(scope="module")
def values():
    return load_file(GOLDEN / "methods-1.safetensors")


@pytest.fixture(scope="module")
def models():
    return {
        name: load_file(GOLDEN / "family" / folder / "model.safetensors")
        for name, folder in {"base": "base", **{task: f"tasks/{task}" for task in TASKS}}.items()
    }


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "plan.json"
    succeeds("plan", "--base", GOLDEN / "family/base", "--tasks", GOLDEN / "family/tasks", "-o", path)
    return path


def call(case):
    method, arguments = METHODS["cases"][case]["method"], METHODS["cases"][case]["arguments"]
    return method + ":" * bool(arguments) + ",".join(f"{key}={json.dumps(value)}" for key, value in arguments.items())


def merged(plan, case, tmp_path):
    """A bundle of every merge of the order."""
    succeeds(
        "merge",
        plan,
        "--method",
        call(case),
        "--merges",
        len(ORDER["orders"]["complete"]["steps"]),
        "-o",
        tmp_path / case,
    )
    return open_bundle(tmp_path / case)


def assert_near(delta, expected, case, base):
    """Within the case's tolerance, and the rounding of float32(base + delta): a bundle holds no deltas."""
    tolerance = METHODS["cases"][case]["tolerance"]
    bound = tolerance["atol"] + tolerance["rtol"] * expected.abs().max()
    half_ulp = torch.from_numpy(np.spacing((base + expected).abs().float().numpy())) / 2
    assert bool(((delta - expected).abs() <= bound + half_ulp).all())


@pytest.mark.parametrize("case", PLAIN)
def test_merged_weights_are_golden(case, plan, models, values, tmp_path):
    bundle = merged(plan, case, tmp_path)
    for tensor in TENSORS:
        base = models["base"][tensor].double()
        found = {task: bundle.view(task)[tensor] for task in TASKS}
        assert len({value.data_ptr() for value in found.values()}) == 1
        assert_near(found["cars"].double() - base, values[f"{case}/all/{tensor}"].double(), case, base)


@pytest.mark.parametrize("case", MASKED)
def test_masked_weights_are_golden(case, plan, models, values, tmp_path):
    bundle = merged(plan, case, tmp_path)
    parts = {name: tensor for file in bundle._bundle.parts.values() for name, tensor in file.items()}
    for tensor in TENSORS:
        base = models["base"][tensor].double()
        assert bool((torch.from_numpy(bundle._bundle.bits(parts[f"{tensor}@base"])).view(base.shape) == base).all())
        unified = torch.from_numpy(bundle._bundle.bits(parts[f"{tensor}@unified"])).view(base.shape).double()
        assert_near(unified, values[f"{case}/all/{tensor}"].double(), case, torch.zeros_like(base))
        for task in STORED:
            given = bundle.view(task)[tensor].double() - base
            assert_near(given, values[f"{case}/all/{tensor}/{task}"].double(), case, base)


def test_every_case_of_our_methods_is_compared():
    ours = {"average", "task_arithmetic", "ties", "emr", "consensus"}
    cases = {name for name, case in METHODS["cases"].items() if case["method"] in ours and not case["steps"]}
    assert cases == {*PLAIN, *MASKED}


@pytest.mark.parametrize("name", [name for name, order in ORDER["orders"].items() if order["vectors"] == "deltas"])
def test_the_order_of_a_plan_is_golden(name, plan):
    order = ORDER["orders"][name]
    settings = OrderSettings(
        linkage=Linkage(order["linkage"]),
        strategy=Strategy(order["strategy"].replace("_", "-")),
        similarity=Similarity(order["metric"]),
        seed=order.get("seed", 0),
    )
    tasks = {task: GOLDEN / "family/tasks" / task for task in TASKS}
    made = make_plan(GOLDEN / "family/base", tasks, order=settings)
    assert list(made.task_names) == ORDER["tasks"]
    assert [block.name for block in made.blocks] == ORDER["blocks"]
    assert {block.name: block.elements for block in made.blocks} == ORDER["elements"]
    steps = [(step["block"], tuple(step["left"]), tuple(step["right"])) for step in order["steps"]]
    assert [(merge.block, merge.left, merge.right) for merge in made.order] == steps
    for merge, step in zip(made.order, order["steps"]):
        assert merge.similarity == pytest.approx(step["similarity"], rel=0, abs=2.0**-20)
    if order["metric"] != "sign":  # signs are counted where they are asked for
        assert replan(load_plan(plan), settings).order == made.order


def test_plain_prefixes_cost_what_the_golden_file_says(plan):
    """float32, no private tensors: four bytes of the tool's layout are one element of the idealised price."""
    cutter = Cutter(Pricer(load_plan(plan)), parse_use("average"))
    steps = ORDER["orders"]["complete"]["steps"]
    assert cutter.sizes() == [4 * 8 * ORDER["total_elements_one_model"], *(4 * step["plain"] for step in steps)]


def test_masked_prefixes_cost_the_golden_price_and_the_padding_of_masks_and_the_factors(plan):
    """Only that: up to 7 bits per mask and 4 bytes per factor, less what tensors too small for masks save as copies."""
    cutter = Cutter(Pricer(load_plan(plan)), parse_use("emr"))
    steps = ORDER["orders"]["complete"]["steps"]
    masks = len(TASKS) * len(load_plan(plan).tensors)
    for found, step in zip(cutter.sizes()[1:], steps):
        assert 0 <= found - 4 * step["masked"] <= masks + 4 * len(TASKS) * len(ORDER["blocks"])


@pytest.mark.parametrize(("kind", "method", "slack"), [("plain", "average", 0), ("masked", "consensus", 2)])
def test_targets_are_cut_where_the_golden_file_says(kind, method, slack, plan):
    """The exact layout of masks may differ from the idealised price by a merge or two."""
    cutter = Cutter(Pricer(load_plan(plan)), parse_use(method))
    sizes = cutter.sizes()
    for factor, expected in ORDER["targets"][kind].items():
        size = parse_size(f"{factor}x").target(num_tasks=8, one_model_bytes=cutter.plan.one_model_bytes)
        if expected is None:
            with pytest.raises(GateError, match="its smallest is"):
                cutter.cut(size, Fit.PREFIX)
            continue
        merges = cutter.cut(size, Fit.PREFIX).merges
        assert abs(merges - expected) <= slack
        assert sizes[merges] <= size.max_bytes
        assert merges == 0 or sizes[merges - 1] > size.max_bytes
