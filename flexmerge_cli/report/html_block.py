"""Marks up one block of a plan: its dendrogram, and the similarity of every two tasks."""

from collections.abc import Sequence

import numpy as np

from flexmerge_cli.order.order import Merge
from flexmerge_cli.order.similarity import similarity_of_identical
from flexmerge_cli.report.html import cell_style, cells, name, text
from flexmerge_cli.report.html_chart import Point, Tick, brackets, chart, fraction, nice_ticks
from flexmerge_cli.report.inspect_draw import NUMBERED_TASKS
from flexmerge_cli.report.inspect_heat import Scale, png
from flexmerge_cli.report.inspect_plan import PlanFacts

ROW_REM, NARROW_ROW_REM = 1.7, 1.0
TASK_CHARACTERS = 16


def heat_picture(matrix: np.ndarray, scale: Scale, says: str) -> str:
    """Make an image of [rows, columns], one pixel per number, which the page stretches."""
    return f'<img class=heat alt="{text(says)}" title="{text(says)}" src="{png(scale.colours(matrix))}">'


def one_block(facts: PlanFacts, index: int, *, chosen: bool) -> str:
    """Make the section. chosen: the block shown until another is picked."""
    block, pairs = facts.plan.blocks[index], facts.pairs(index)
    merges = [(position, facts.merges[position - 1]) for position in facts.positions[index]]
    leaves = leaf_order(len(facts.plan.tasks), [merge for _, merge in merges])
    said = f"{len(block.tensors)} tensors, {block.elements:,} parameters."
    if pairs:
        said += (
            f" Mean similarity {facts.scale.text(pairs['mean'])}; most alike {_pair(facts, pairs['most'])}, "
            f"least {_pair(facts, pairs['least'])}."
        )
    return (
        f'<article id="block-{index}"{" class=chosen" if chosen else ""}><h3>{name(block.name)}</h3><p>{text(said)}</p>'
        f"<div class=pair>{_tree(facts, merges, leaves)}{_heat(facts, index, leaves)}</div></article>\n"
    )


def leaf_order(num_tasks: int, merges: Sequence[Merge]) -> list[int]:
    """Order the tasks so that every group is contiguous, and the groups of a join are left and right."""
    order: dict[tuple[int, ...], list[int]] = {(task,): [task] for task in range(num_tasks)}
    for merge in merges:
        joined = order.pop(merge.left) + order.pop(merge.right)
        order[tuple(sorted(merge.left + merge.right))] = joined
    return [task for group in sorted(order) for task in order[group]]


def tree_joins(
    merges: Sequence[tuple[int, Merge]], leaves: Sequence[int], near: float, far: float
) -> list[tuple[Point, Point, float]]:
    """Return the brackets of a tree, from similarity `near` on the left to `far` on the right, one row per leaf from
    the top."""
    ends: dict[tuple[int, ...], Point] = {
        (task,): (0.0, 1 - (row + 0.5) / len(leaves)) for row, task in enumerate(leaves)
    }
    joins = []
    for _, merge in merges:
        left, right = ends.pop(merge.left), ends.pop(merge.right)
        meet = fraction(merge.similarity, near, far)
        joins.append((left, right, meet))
        ends[tuple(sorted(merge.left + merge.right))] = (meet, (left[1] + right[1]) / 2)
    return joins


def _tree(facts: PlanFacts, merges: Sequence[tuple[int, Merge]], leaves: Sequence[int]) -> str:
    plan = facts.plan
    near = similarity_of_identical(plan.settings.similarity)
    far = min([merge.similarity for _, merge in merges], default=near)
    far -= 0.1 * (near - far)  # room for the number of the last join
    joins = tree_joins(merges, leaves, near, far)
    numbered = len(leaves) <= NUMBERED_TASKS
    places = [
        f'<span class=at style="left:{100 * meet:.2f}%;bottom:{50 * (a[1] + b[1]):.2f}%">{position:,}</span>'
        for (position, _), (a, b, meet) in zip(merges, joins)
    ]
    rows = [
        Tick(place=1 - (row + 0.5) / len(leaves), label=name(plan.task_names[task], TASK_CHARACTERS))
        for row, task in enumerate(leaves)
    ]
    picture = chart(
        brackets(joins),
        says="dendrogram of the tasks in this block",
        height=f"{(ROW_REM if numbered else NARROW_ROW_REM) * len(leaves):g}rem",
        left=rows,
        below=[
            Tick(place=fraction(tick, near, far), label=f"{tick:g}", line=True)
            for tick in nice_ticks(min(near, far), max(near, far), 5)
        ],
        over="".join(places) if numbered else "",
        kind="tasks" if numbered else "tasks dense",
        across="similarity at which tasks merge",
    )
    return f"<div><h4>Merges</h4>{picture}</div>"


def _heat(facts: PlanFacts, index: int, leaves: Sequence[int]) -> str:
    return f"<div><h4>Similarity</h4>{heat_of_tasks(facts, facts.similarity[index], leaves, facts.scale)}</div>"


def heat_of_tasks(facts: PlanFacts, values: np.ndarray, leaves: Sequence[int], scale: Scale) -> str:
    """Make the heat map of a number for every two tasks, [M, M], with the tasks in the order of leaves."""
    names, matrix = facts.plan.task_names, values[np.ix_(leaves, leaves)]
    if len(leaves) > NUMBERED_TASKS:
        rows = [
            Tick(place=1 - (row + 0.5) / len(leaves), label=name(names[task], TASK_CHARACTERS))
            for row, task in enumerate(leaves)
        ]
        says = "a number for every two tasks"
        height = f"{NARROW_ROW_REM * len(leaves):g}rem"
        image = heat_picture(matrix, scale, says)
        return chart("", says=says, height=height, left=rows, over=image, kind="tasks dense")
    head = (f'<th scope=col title="{text(names[task])}">{task + 1}</th>' for task in leaves)
    shown = (
        [f'<td style="{cell_style(scale, value)}">{scale.text(value)}</td>' for value in row] for row in matrix.tolist()
    )
    return cells(head, zip((f"{task + 1} {name(names[task], TASK_CHARACTERS)}" for task in leaves), shown))


def _pair(facts: PlanFacts, pair: dict[str, object]) -> str:
    value = pair["similarity"]
    assert isinstance(value, float) and isinstance(pair["tasks"], list)
    return f"{' and '.join(pair['tasks'])} {facts.scale.text(value)}"
