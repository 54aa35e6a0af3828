"""How few files a route could have, if files of rare sets of tasks were joined: `python -m tests.bench_routes [PLAN]`.

Files are joined in pairs, the pair first that makes tasks read the fewest bytes that are not their own, as long as no
task reads more than a limit of them. `bound` says what no layout of whole files can beat that stores nothing twice.
Without a plan: 30 tasks of 24 layers, drawn.
"""

import math
import sys
import tempfile
from pathlib import Path

from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.planning.make import load_plan
from flexmerge_cli.request.merge import merge_request

from .families import plain, write_family
from .program import succeeds

SIZE = "2.25x"


def main(path: Path) -> None:
    layout = allocate(load_plan(path), merge_request(method="average", size=SIZE))
    print(f"{len(layout.plan.tasks)} tasks at {SIZE}\nlimit   names differ   files   longest route   at least")
    for limit, names_differ in ((None, True), (0.02, True), (0.02, False), (0.05, False), (0.2, False)):
        files, longest = joined(layout, limit, names_differ=names_differ)
        told = "none" if limit is None else f"{limit:.0%}"
        print(f"{told:>5}   {names_differ!s:>12}   {files:5}   {longest:13}   {bound(layout, limit):8}")


def joined(layout: BundleLayout, limit: float | None, *, names_differ: bool) -> tuple[int, int]:
    """Files, and those of the longest route. limit: over-read bytes of a task's own; None: nothing is joined.

    names_differ: whether files are joined only if no part of one has the name of a part of the other.
    """
    files = [
        (
            frozenset(file.readers),
            sum(part.num_bytes for part in file.parts),
            frozenset(part.name for part in file.parts),
        )
        for file in layout.files
    ]
    room = {task: (limit or 0) * sum(b for r, b, _ in files if task in r) for task in layout.plan.all_tasks}
    while limit is not None:
        best: tuple[int, int, int] | None = None
        for i, (a, x, first) in enumerate(files):
            for j, (b, y, second) in enumerate(files[:i]):
                cost = len(b - a) * x + len(a - b) * y
                if (best is not None and cost >= best[0]) or (names_differ and first & second):
                    continue
                if all(room[task] >= x for task in b - a) and all(room[task] >= y for task in a - b):
                    best = cost, i, j
        if best is None:
            break
        (a, x, first), (b, y, second) = files.pop(best[1]), files.pop(best[2])
        room |= {task: room[task] - x for task in b - a} | {task: room[task] - y for task in a - b}
        files.append((a | b, x + y, first | second))
    return len(files), max(sum(task in readers for readers, *_ in files) for task in layout.plan.all_tasks)


def bound(layout: BundleLayout, limit: float | None) -> int:
    """Return a number of files that the longest route has at least, in any layout within the limit.

    Say a file is read by the tasks U. Of the sets of readers whose parts it holds, at most one is U; each other set S
    is smaller, so that at least one task reads all bytes of S without need. In return, each task of S reads one file
    less. So the sum of all routes falls by at most |S| for each set whose bytes are over-read, and all that may be
    over-read is the limit times what all tasks read: a knapsack, into which a part of a set may go here. Nothing is
    gained by parts of one set in several files, unless all of them are over-read.
    """
    weight: dict[frozenset[int], int] = {}
    for file in layout.files:
        readers = frozenset(file.readers)
        weight[readers] = weight.get(readers, 0) + sum(part.num_bytes for part in file.parts)
    reads = float(sum(len(readers) for readers in weight))
    budget = (limit or 0) * sum(len(readers) * num_bytes for readers, num_bytes in weight.items())
    for readers, num_bytes in sorted(weight.items(), key=lambda item: item[1] / len(item[0])):
        taken = min(1.0, budget / num_bytes) if num_bytes else 1.0
        reads, budget = reads - taken * len(readers), budget - taken * num_bytes
    return max(1, math.ceil(reads / len(layout.plan.tasks) - 1e-9))


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            family = write_family(Path(folder), plain(num_tasks=30, layers=24, width=8), side_files=False)
            succeeds("plan", *family.arguments, "--statistics", "gram", "-o", Path(folder) / "plan.json", "-q")
            main(Path(folder) / "plan.json")
