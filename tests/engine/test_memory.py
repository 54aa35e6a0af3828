"""`--max-memory` is a promise: every method stays under the least figure that it is told, and the figure is not idle.

Peaks are the kernel's own (peaks.py). The figure may be exceeded by 15 %, which covers what the allocator keeps of
memory that was freed.
"""

import sys

import numpy as np
import pytest

from flexmerge_cli import make_plan
from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.engine.memory import Pass
from flexmerge_cli.engine.merge_memory import merge_bytes
from flexmerge_cli.engine.pool import AHEAD
from flexmerge_cli.engine.spans import Span
from flexmerge_cli.engine.statistics import run_statistics
from flexmerge_cli.methods.method import UNDECLARED, Where
from flexmerge_cli.methods.registry import all_calibrations, all_methods, all_steps
from flexmerge_cli.request.merge import merge_request

from ..families import plain, write_family
from ..program import fails, succeeds
from .merges import DEFAULTS
from .peaks import measured

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

EXCESS = 1.15
IDLE = 3.5
"""Times the peak that the figure may be: threads need not be at their largest items at once."""
TELLING = 24 << 20
"""A run that takes more than the fixed part, twice over: of such a one the figure says something."""

MERGES = [
    *({"family": "few", "method": text} for text in DEFAULTS.values()),
    *({"family": "few", "method": "average", "steps": [step]} for step in ("dare", "magprune", "trim", "fr")),
    {"family": "few", "method": "task_arithmetic", "calibrate": "svc"},
    {"family": "few", "method": "auto", "size": "1x"},
    {"family": "few", "method": "average", "dtype": "bfloat16"},
    {"family": "few", "method": "ties", "dtype": "bfloat16", "cast": "fp16"},
    *({"family": "many", "method": method} for method in ("average", "pcb", "pcb:scope=model", "ties", "free", "opcm")),
    *({"family": "conv", "method": method} for method in ("della", "low_bit", "sparse")),
    *({"family": "embedding", "method": method} for method in ("pcb", "emr", "low_rank")),
    {"family": "thin", "method": "sce:scope=row"},
    *({"family": "wide", "method": method, "threads": 2} for method in ("pcb", "low_bit:bits=3,centre=ties")),
]
PLANS = [
    {"family": family, "statistics": statistics}
    for family in ("few", "embedding", "thin", "long")
    for statistics in ("all", "gram")
]
ODD = [
    *({"family": "few", "method": method, "kind": "kept"} for method in ("ties", "average")),
    {"family": "wide", "method": "average", "kind": "pool"},
    {"family": "few", "method": "ties", "kind": "mixed"},
    *({"family": "embedding", "method": method, "kind": "rows"} for method in ("ties", "low_bit:bits=3")),
    *({"family": family, "method": "average", "cluster": "channels", "size": "2x"} for family in ("few", "conv")),
    *({"family": "wide", "method": method, "tasks": 8, "threads": 2} for method in ("average", "low_bit:bits=3")),
    {"family": "few", "method": "tsv_m", "tasks": 8, "threads": 2},
    *(
        {"family": family, "statistics": "all", "kind": kind}
        for family, kind in (("few", "kept"), ("wide", "pool"), ("few", "mixed"), ("embedding", "rows"))
    ),
    {"family": "long", "statistics": "all", "tasks": 8, "threads": 2},
]
TWICE = ("average", "ties", "pcb", "pcb:scope=model", "free", "emr", "low_bit", "low_rank", "opcm")
"""Methods of every kind of workspace and pass, merged by two threads as well. What a method itself takes shows in one,
where nothing else is in memory."""


def numbers_of_threads(case):
    if "threads" in case:
        return (case["threads"],)
    return (1, 2) if "statistics" in case or "steps" in case or case["method"] in TWICE or "kind" in case else (1,)


CASES = [
    {"tasks": 4, "chunk": "smallest", "threads": threads, **case}
    for case in [*MERGES, *PLANS, *ODD]
    for threads in numbers_of_threads(case)
]


def label(case):
    return " ".join(
        str(case[key])
        for key in (
            "family",
            "kind",
            "method",
            "statistics",
            "steps",
            "calibrate",
            "cluster",
            "cast",
            "tasks",
            "threads",
        )
        if key in case
    )


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    return measured(CASES, tmp_path_factory.mktemp("peaks"))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[label(case) for case in CASES])
def test_a_run_keeps_to_the_least_memory_that_it_asks_for(number, peaks):
    peak, told = peaks[number]["peak"], peaks[number]["told"]
    assert peak <= EXCESS * told, (peak, told)
    assert peak < TELLING or told <= IDLE * peak, (peak, told)


@pytest.mark.parametrize("what", [*all_methods().values(), *all_steps().values(), *all_calibrations().values()])
def test_what_computes_tells_its_workspace(what):
    from flexmerge_cli.methods.coded import CodedMethod

    assert isinstance(what, CodedMethod) or what.workspace is not UNDECLARED


def test_several_sizes_count_their_results_and_what_computes_once(tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=3, layers=2))
    pricer = Pricer(make_plan(folders.base, folders.tasks, statistics="gram"))
    found = [allocate(pricer.plan, merge_request(method="average", size=size), pricer) for size in ("1.5x", "2x")]
    single, both = [merge_bytes(one, 2) for one in found], merge_bytes(found[0], 2, others=found[1:])
    assert max(single) < both < sum(single)


def test_what_there_is_once_counts_once():
    """Two threads counted twice the largest item, where a model has one tensor of that size."""
    taken = Pass()
    taken.add(1, raw=1000, work=500, result=0)
    taken.add(9, raw=10, work=3, result=7, totals=40)
    assert taken.bytes(1) == 1000 + 500 + 7 * (1 + AHEAD + 1) + 40
    assert taken.bytes(2) == 1010 + 503 + 7 * min(9, 2 + AHEAD + 1) + 40


def test_too_little_is_refused_with_the_figure_that_will_do(tmp_path):
    folders, plan = write_family(tmp_path, plain()), tmp_path / "plan.json"
    for command in (
        ("plan", *folders.arguments, "-o", plan, "--max-memory"),
        ("merge", plan, "--method", "pcb", "--size", "2x", "-o", tmp_path / "bundle", "--max-memory"),
    ):
        refused = fails(2, *command, "1MB", says="are needed")
        succeeds(*command, refused.err.split("hint: --max-memory ")[1].split()[0])


def test_what_statistics_hold_does_not_grow_with_the_number_of_blocks():
    """Each block's total was kept until the end of the pass: half a megabyte a task and block."""
    held, most = set(), 0

    class Noted:
        scope, per = "block", "task"

        def combine(self, left, right):
            nonlocal most
            held.add(left[0])
            most = max(most, len(held))
            return left[0], left[1] + right[1]

        def measure(self, deltas, where):
            return where.tensor.split(".")[0], 1

        def finish(self, total):
            held.discard(total[0])
            return np.array(total[1])

    names = [f"b{block}.{part}" for part in range(3) for block in range(8)]
    spans = [Span(name, 0, 4, True, 4) for name in names]
    found = run_statistics(
        Noted(),
        {f"b{block}": [(0, 1)] for block in range(8)},
        spans,
        lambda _scope, tensor: tensor.split(".")[0],
        lambda span, tasks: np.zeros((len(tasks), 4)),
        lambda span, tasks: Where(tasks=("a", "b"), tensor=span.tensor, start=0, shape=(4,)),
        threads=2,
    )
    assert {key[0]: int(value) for key, value in found.items()} == {f"b{block}": 3 for block in range(8)}
    assert most == 1
