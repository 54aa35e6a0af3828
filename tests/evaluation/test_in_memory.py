"""Bundles in memory against bundles on disk: the same weights and digests, whatever was made before."""

import itertools
from pathlib import Path

import pytest
import torch

from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.layout import BundleLayout, Pricer
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.view import View
from flexmerge_cli.errors import DataError, GateError
from flexmerge_cli.evaluation.in_memory import MemoryBundles
from flexmerge_cli.planning.sources import open_sources
from flexmerge_cli.request.merge import merge_request

from ..engine.merges import EDGES, FAMILIES, billed, groups_of, plan_of, planned, write
from ..families import ODD, Folders, assert_same_state, plain, write_family
from ..program import succeeds

METHODS = {
    "dense": {"method": "task_arithmetic"},
    "statistics of the model": {"method": "ties:K=0.3,scope=model"},
    "a block at once": {"method": "pcb"},
    "masked": {"method": "emr"},
    "masked by another": {"method": "consensus"},
    "residuals": {"method": "low_bit:bits=2,centre_bits=8"},
    "no centre": {"method": "low_bit:bits=3,centre=none"},
    "against the base": {"method": "low_bit:bits=2,centre=base"},
    "steps": {"method": "average", "steps": ("dare:p=0.5",)},
    "calibrated": {"method": "task_arithmetic", "calibrate": "svc"},
    "two methods": {"method": "ties", "method_for": ("*.attention=emr", "pooler.*=keep")},
    "auto": {"method": "auto"},
    "cast": {"method": "average", "dtype": "bf16"},
    "nothing merged": {},
    "only cast": {"dtype": "fp16"},
}
SIZES = ("4x", "3x", "2x", "1.2x", "1x")


def in_memory(folders: Folders, **options: int) -> MemoryBundles:
    sources = open_sources(plan_of(folders), folders.root)
    return MemoryBundles(sources=sources.located, device=torch.device("cpu"), threads=1, **options)


def assert_same_bundle(found: Bundle, expected: Bundle, tasks: list[str]) -> None:
    for task in tasks:
        assert_same_state(dict(View(found, task)), dict(View(expected, task)))
        assert digests_of(found, task) == digests_of(expected, task)


def digests_of(bundle: Bundle, task: str) -> dict[str, str]:
    return {tensor.name: tensor.digests[task] for tensor in bundle.manifest.tensors if task in tensor.digests}


def layouts(folders: Folders, request: dict) -> list[BundleLayout]:
    """Return the layouts of all sizes that the method reaches, and of its smallest."""
    plan, found = plan_of(folders), []
    pricer = Pricer(plan)
    for size in (*SIZES, None) if "method" in request else (None,):
        try:
            found.append(allocate(plan, merge_request(size=size, **request), pricer))
        except GateError:
            continue
    assert found
    return found


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_those_of_the_bundle_as_the_cut_moves(family, plan, tmp_path, name):
    made = in_memory(family)
    for number, layout in enumerate(layouts(family, METHODS[name])):
        tasks = range(len(layout.plan.tasks))
        written = write(family, layout, tmp_path / str(number))
        assert_same_bundle(made.bundle(layout, tasks), Bundle.open(written), list(layout.plan.task_names))


@pytest.fixture(scope="module")
def planned_family(tmp_path_factory):
    made: dict[str, Folders] = {}

    def get(name: str) -> Folders:
        if name not in made:
            models = (FAMILIES | EDGES | ODD)[name]()
            made[name] = planned(tmp_path_factory.mktemp("planned"), models)
        return made[name]

    return get


@pytest.mark.parametrize("dtype", [None, "BF16"])
@pytest.mark.parametrize(
    "name", ["mixed", "edges", "zeros", "tied", "heads", "duplicates", "wrapped_tasks", "resized_vocabulary"]
)
def test_weights_are_those_of_the_bundle_of_odd_families(planned_family, tmp_path, name, dtype):
    folders = planned_family(name)
    made = in_memory(folders)
    plan = plan_of(folders)
    for shift in range(2):
        count = len(plan.blocks)
        groups = [groups_of(len(plan.tasks), index + shift) for index in range(count)]
        layout = billed(plan, "average", "emr", "low_bit:bits=2", "low_bit:centre=none", groups=groups, dtype=dtype)
        written = write(folders, layout, tmp_path / f"{shift}")
        assert_same_bundle(made.bundle(layout, plan.all_tasks), Bundle.open(written), list(plan.task_names))


@pytest.mark.parametrize("tasks", [range(7), (0,), (6, 2)])
def test_groups_that_come_later_get_what_their_unit_stores_once(tmp_path, tasks):
    """The factors of masks of a unit were not written, if some of its groups had theirs already."""
    folders = planned(tmp_path, plain(num_tasks=7, layers=1))
    plan, made = plan_of(folders), in_memory(folders)
    for number, groups in enumerate([[(0, 1, 2), (3, 4, 5), (6,)], [(0, 1, 2), (3, 4, 5, 6)]]):
        layout = billed(plan, "emr", groups=[groups] * len(plan.blocks))
        written = write(folders, layout, tmp_path / str(number))
        names = [plan.task_names[task] for task in tasks]
        assert_same_bundle(made.bundle(layout, tasks), Bundle.open(written), names)


def test_one_task_at_a_time_gives_the_same(family, plan, tmp_path):
    layout = layouts(family, METHODS["two methods"])[2]
    written, made = Bundle.open(write(family, layout, tmp_path / "bundle")), in_memory(family)
    for task in reversed(layout.plan.all_tasks):
        assert_same_bundle(made.bundle(layout, [task]), written, [layout.plan.task_names[task]])


def test_a_part_is_made_once_and_only_those_of_new_groups(family, plan):
    made, cuts = in_memory(family), layouts(family, METHODS["dense"])
    everyone = cuts[0].plan.all_tasks
    seen: set = set()
    for layout in cuts:
        before = made.num_made
        new = {key for key in made.keys(layout, everyone) - seen if key[0] not in ("copy", "whole", "base")}
        made.bundle(layout, everyone)
        assert made.num_made - before == len(new)
        seen |= made.keys(layout, everyone)
    assert made.num_made > 0


def test_what_is_forgotten_is_made_again(family, plan, tmp_path):
    made, layout = in_memory(family), layouts(family, METHODS["masked"])[-1]
    everyone = layout.plan.all_tasks
    made.bundle(layout, everyone)
    assert made.num_bytes > 0
    made.keep_only(set())
    assert made.num_bytes == 0
    written = write(family, layout, tmp_path / "bundle")
    assert_same_bundle(made.bundle(layout, everyone), Bundle.open(written), list(layout.plan.task_names))


@pytest.mark.parametrize("name", ["dense", "masked", "auto", "two methods"])
def test_identity_tells_which_tasks_changed(family, plan, name):
    """Equal identities have equal digests."""
    made = in_memory(family)
    found: dict = {}
    for layout in layouts(family, METHODS[name]):
        bundle = made.bundle(layout, layout.plan.all_tasks)
        for task, of_task in enumerate(layout.plan.task_names):
            digests = digests_of(bundle, of_task)
            assert found.setdefault((task, made.identity(layout, task)), digests) == digests


def test_a_merge_changes_the_identity_of_its_tasks_alone(family, plan):
    loaded, made = plan_of(family), in_memory(family)
    pricer = Pricer(loaded)
    one, two = (allocate(loaded, merge_request(method="average", merges=n), pricer) for n in (3, 4))
    merge = loaded.merges()[3]
    for task in loaded.all_tasks:
        same = made.identity(one, task) == made.identity(two, task)
        assert same == (task not in merge.left + merge.right)


def test_chunks_and_forgetting_do_not_show(planned_family):
    folders = planned_family("float32")
    layout = billed(plan_of(folders), "emr", "low_bit:bits=2", "ties:scope=model")
    everyone = layout.plan.all_tasks
    whole, cut = in_memory(folders), in_memory(folders, chunk_elements=1 << 10)
    assert_same_bundle(whole.bundle(layout, everyone), cut.bundle(layout, everyone), list(layout.plan.task_names))


def test_a_source_that_changed_is_refused(tmp_path):
    folders = write_family(tmp_path, ODD["heads"]())
    succeeds("plan", *folders.arguments, "-o", folders.root / "plan.json")
    file = next(Path(folders.tasks[name]) for name in sorted(folders.tasks)) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    plan = plan_of(folders)
    layout, made = allocate(plan, merge_request()), in_memory(folders)
    with pytest.raises(DataError, match="has changed since the plan"):
        for task in itertools.chain(plan.all_tasks):
            made.bundle(layout, [task])
