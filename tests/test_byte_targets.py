"""A byte target is kept to the byte by what lies on disk, and nothing that would still have fitted was given up."""

import random

import pytest

from flexmerge_cli import load_plan, open_bundle
from flexmerge_cli.allocation.allocation import from_groups
from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.methods.use import parse_use
from flexmerge_cli.request.merge import merge_request

from .allocation.test_cut import undos
from .families import Models, encoder, normal, tuned, write_family
from .program import stored_sizes, succeeds


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Ten blocks, four tasks with heads of their own."""
    base = encoder(layers=1, width=16)
    tasks = {f"task{n}": tuned(base, n + 1) | {"classifier.bias": normal(n, n + 2)} for n in range(4)}
    folders = write_family(tmp_path_factory.mktemp("small"), Models(base=base, tasks=tasks))
    succeeds("plan", *folders.arguments, "-o", folders.root / "plan.json")
    return folders.root / "plan.json"


def stored(pricer, folder, method):
    """The allocation that a bundle tells of."""
    manifest, tasks = open_bundle(folder).manifest, pricer.plan.task_names
    groups = [[tuple(tasks.index(task) for task in group.tasks) for group in unit.groups] for unit in manifest.units]
    told = manifest.allocation
    methods = Cutter(pricer, parse_use(method)).methods
    return from_groups(pricer.plan, groups, methods=methods, merges=told.merges, undone=told.undone, fit=told.fit)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "ties", "emr"])
def test_random_byte_targets_are_kept(method, small, tmp_path):
    pricer = Pricer(load_plan(small)).asked(merge_request(method=method))
    method = parse_use(method).text
    made = Cutter(pricer, parse_use(method))
    least, most = (pricer.layout(allocation).total_bytes for allocation in (made.smallest(), made.prefix(0)))
    draw = random.Random(method)
    seen = set()
    for number in range(16):
        target = draw.randint(least, most)
        options = ["--method", method, "--size", f"{target}B", "-o", tmp_path / str(number), "--json"]
        said = succeeds("merge", small, *options, "--dry-run").json
        succeeds("merge", small, *options)
        on_disk = sum(stored_sizes(tmp_path / str(number)).values())
        assert on_disk == said["total_bytes"] <= target
        assert on_disk == sum(said["files"].values())
        allocation = stored(pricer, tmp_path / str(number), method)
        assert pricer.layout(allocation).total_bytes == on_disk
        for fewer in undos(pricer, allocation):
            assert pricer.layout(fewer).total_bytes > target
        seen.add((allocation.merges, allocation.undone))
    assert len(seen) > 5 and any(undone for _, undone in seen)
