"""Shows a plan as one page: its size, how similar its tasks are in each block, and the order in which blocks merge."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from flexmerge_cli.report.html import facts as fact_list
from flexmerge_cli.report.html import legend, name, page, section, table, text, today
from flexmerge_cli.report.html_block import heat_of_tasks, heat_picture, one_block
from flexmerge_cli.report.html_chart import Tick, band, chart, dots, fraction, line, nice_ticks
from flexmerge_cli.report.inspect_heat import Scale
from flexmerge_cli.report.inspect_plan import PlanFacts, cosine_scale
from flexmerge_cli.report.options import DISTANCE_NOTE, KEPT_NOTE, OPTION_HEADS, option_remarks, shown_options
from flexmerge_cli.report.text import human_bytes, tail

BINS = 32  # colours of the dots
LABELLED_BLOCKS = 60  # with more, not every row has its name
ROW_PIXELS = 15


def plan_page(facts: PlanFacts) -> str:
    """Make the whole document."""
    plan = facts.plan
    settings = plan.settings
    subtitle = fact_list(
        [
            ("tasks", str(len(plan.tasks))),
            ("base", name(plan.base.source)),
            ("one model", human_bytes(plan.one_model_bytes)),
            ("blocks", f"{len(plan.blocks):,} ({text(settings.blocks)})"),
            ("merges", f"{len(plan.order):,}"),
            ("order", text(f"{settings.similarity}, {settings.linkage} linkage, {settings.strategy}")),
            ("page of", today()),
        ]
    )
    sections = [_options(facts), _tasks(facts)]
    if len(facts.cosine) > 1:
        sections.insert(1, _task_vectors(facts))
    if plan.order:
        sections[1:1] = [_size(facts), _tiles(facts), _one(facts), _depth(facts)]
    return page(f"{facts.path.name}: a plan of {len(plan.tasks)} tasks", subtitle, sections)


def _task_vectors(facts: PlanFacts) -> str:
    heat = heat_of_tasks(facts, facts.cosine, range(len(facts.cosine)), cosine_scale(facts.cosine))
    note = "The cosine of every two task vectors, over all tensors that merge."
    return section("Task vectors", heat, note=note)


def _options(facts: PlanFacts) -> str:
    commands = [row["command"] for row in facts.options["options"] if not row["is_larger"]]
    rows = [
        [text(cell) for cell in cells] + [f"<code>{text(command)}</code>" if command else ""]
        for cells, command in zip(shown_options(facts.options), commands)
    ]
    remarks = "".join(f"<p>{text(line)}</p>" for line in option_remarks(facts.options))
    return section(
        "Options to store them",
        remarks,
        table([*OPTION_HEADS, "command"], rows, words=(len(OPTION_HEADS),)),
        note=f"{KEPT_NOTE}.",
    )


def _size(facts: PlanFacts) -> str:
    plan, curve = facts.plan, facts.curve
    one, merges = max(1, plan.one_model_bytes), max(1, len(plan.order))
    factors = np.array(curve.tensor_bytes) / one
    top = float(factors.max()) or 1.0
    size = chart(
        line([(cut / merges, factors[cut] / top) for cut in curve.cuts], "line one"),
        says=f"size falls from {factors[0]:.2f}x to {factors[-1]:.2f}x over {merges} merges",
        height="15rem",
        left=[Tick(place=tick / top, label=f"{tick:g}x", line=True) for tick in nice_ticks(0, top)],
        right=[Tick(place=tick / (top * one), label=human_bytes(tick)) for tick in nice_ticks(0, top * one)],
        below=[Tick(place=tick / merges, label=f"{tick:,.0f}") for tick in nice_ticks(0, merges, 5)],
        kind="both",
        up="size in models (left) and bytes (right)",
        across="merges made",
    )
    found = curve.distance["average"]
    best, mean, worst = (_of_known(reduce, found) for reduce in (np.min, np.mean, np.max))
    high, low_x, high_x = max(1e-9, float(worst.max())), float(factors.min()), float(factors.max())
    across = [fraction(float(factors[cut]), low_x, high_x) for cut in curve.cuts]
    distance = chart(
        band(list(zip(across, best / high)), list(zip(across, worst / high)), "band one")
        + line(list(zip(across, mean / high)), "line one"),
        says="distance per task against size of the bundle, see the table",
        height="15rem",
        left=[Tick(place=tick / high, label=f"{tick:g}", line=True) for tick in nice_ticks(0, high)],
        below=[
            Tick(place=fraction(tick, low_x, high_x), label=f"{tick:g}x", line=True)
            for tick in nice_ticks(low_x, high_x, 7)
        ],
        up="distance of a task (0 exact, 1 the base)",
        across="size of the bundle, in models",
    )
    return section(
        "Size",
        f"<div class=pair><div><h3>Size after each merge</h3>{size}</div>"
        f"<div><h3>Distance ≈ at a size</h3>{distance}"
        '<p class=legend><span class="key one">mean, and from best to worst task</span></p></div></div>',
        _size_table(facts),
        note="Bytes are those of methods that store one dense value per merged block, and distances those of average. "
        f"Distance per task: 0 is exact, 1 as far off as the base. {DISTANCE_NOTE}",
    )


def _size_table(facts: PlanFacts) -> str:
    plan, curve = facts.plan, facts.curve
    rows, found = [], curve.distance["average"]
    for size, merges in curve.named:
        cut = curve.cuts.index(merges)
        cells = [f"{value:.3f}" for value in (_of_known(np.mean, found)[cut], _of_known(np.max, found)[cut])]
        groups = len(plan.blocks) * len(plan.tasks) - merges
        bytes_ = curve.tensor_bytes[merges]
        rows.append(
            [size, f"{bytes_ / max(1, plan.one_model_bytes):.2f}x", f"{bytes_:,}", f"{merges:,}", f"{groups:,}", *cells]
        )
    return table(["size", "is", "bytes", "merges", "groups", "mean distance", "worst distance"], rows)


def _tiles(facts: PlanFacts) -> str:
    scale, tiles = facts.scale, []
    for index, block in enumerate(facts.plan.blocks):
        pairs = facts.pairs(index)
        mean = f"{scale.text(pairs['mean'])}" if pairs else ""
        picture = heat_picture(facts.similarity[index], scale, f"similarity of the tasks in {block.name}, mean {mean}")
        tiles.append(f'<a href="#block-{index}">{picture}<b>{mean}</b>{name(block.name, 32, breaks=True)}</a>')
    many = " many" if len(tiles) > LABELLED_BLOCKS else ""
    return section(
        "Similarity in every block",
        _legend(scale),
        f'<div class="tiles{many}">{"".join(tiles)}</div>',
        note="One picture per block, in order of depth: rows and columns are the tasks by name, the number is the "
        "mean over pairs. A block that is light throughout is what keeps the bundle large. Select one to see it below.",
    )


def _one(facts: PlanFacts) -> str:
    chosen = facts.block if facts.block is not None else _largest(facts)
    options = "".join(
        f'<option value="block-{index}"{" selected" if index == chosen else ""}>{text(tail(block.name, 60))}</option>'
        for index, block in enumerate(facts.plan.blocks)
    )
    blocks = "".join(one_block(facts, index, chosen=index == chosen) for index in range(len(facts.plan.blocks)))
    return section(
        "One block",
        f"<p class=pick hidden><label>Block <select id=pick>{options}</select></label></p>",
        f"<div class=blocks>{blocks}</div>",
        note="Left: how its tasks merge, the more alike the further left; small numbers are places in the order of all "
        "merges. Right: the similarity of every two tasks, in the order of the tree.",
    )


def _depth(facts: PlanFacts) -> str:
    plan, merges = facts.plan, facts.merges
    blocks = len(plan.blocks)
    values = np.array([merge.similarity for merge in merges])
    scale = Scale.over(values)
    bins = (scale.place(values) * (BINS - 1)).round().astype(int)
    colours = scale.colours(scale.low + np.arange(BINS) / (BINS - 1) * (scale.high - scale.low))
    rows = ROW_PIXELS * blocks if blocks <= LABELLED_BLOCKS else max(ROW_PIXELS * LABELLED_BLOCKS, 4 * blocks)
    across = max(1, len(merges) - 1)
    marks = []
    for bin_ in sorted(set(bins.tolist())):
        places = [
            (place / across, 1 - (merges[place].block + 0.5) / blocks)
            for place in np.flatnonzero(bins == bin_).tolist()
        ]
        colour = "#" + "".join(f"{part:02x}" for part in colours[bin_].tolist())
        marks.append(dots(places, colour, 9 if blocks <= LABELLED_BLOCKS else 5))
    step = math.ceil(blocks * ROW_PIXELS / rows)
    names = [
        Tick(place=1 - (index + 0.5) / blocks, label=name(plan.blocks[index].name, 26), line=blocks <= LABELLED_BLOCKS)
        for index in range(0, blocks, step)
    ]
    picture = chart(
        "".join(marks),
        says=f"{len(merges)} merges: place in the order against the block's depth",
        height=f"{rows}px",
        left=names,
        above=_apart([Tick(place=cut / len(merges), label=size, line=True) for size, cut in facts.curve.named]),
        below=[Tick(place=tick / len(merges), label=f"{tick:,.0f}") for tick in nice_ticks(0, len(merges), 5)],
        kind="named",
        up="block, the first of the model on top",
        across="place in the order of all merges",
    )
    return section(
        "Order of merges along depth",
        _legend(scale),
        picture,
        note="Each dot is a merge of two groups: from left to right its place in the order, from top to bottom the "
        "block, the first on top. Lines: where the order is cut for a size.",
    )


def _tasks(facts: PlanFacts) -> str:
    rows = [
        [str(number), name(task.name), f"<span class=path>{name(task.source)}</span>", f"{task.bytes:,}"]
        for number, task in enumerate(facts.plan.tasks, 1)
    ]
    return section("Tasks", table(["", "task", "source", "bytes"], rows, left=3))


def _legend(scale: Scale) -> str:
    return legend(f"{scale.text(scale.low)} least alike", f"{scale.text(scale.high)} most alike")


def _largest(facts: PlanFacts) -> int:
    """Return the largest block, on which the size depends most."""
    return max(range(len(facts.plan.blocks)), key=lambda index: facts.plan.blocks[index].elements)


def _of_known(reduce: Callable[..., np.ndarray], found_CM: np.ndarray) -> np.ndarray:
    """Reduce the distances over the tasks that have one; 0 if none has."""
    known = found_CM[:, ~np.isnan(found_CM).any(axis=0)]
    return reduce(known, axis=1) if known.size else np.zeros(len(found_CM))


def _apart(ticks: Sequence[Tick], least: float = 0.12) -> list[Tick]:
    """Drop labels that would overlap on a narrow page."""
    kept: list[Tick] = []
    for tick in sorted(ticks, key=lambda tick: -tick.place):
        if not kept or kept[-1].place - tick.place >= least:
            kept.append(tick)
    return kept
