"""Shows a plan for `inspect`, as tables and pictures on stdout."""

from typing import Any

import numpy as np

from flexmerge_cli.report import inspect_draw as draw
from flexmerge_cli.report.inspect_plan import PlanFacts, cosine_scale
from flexmerge_cli.report.options import show_options, show_sizes
from flexmerge_cli.report.plan import adapter_words, show_low_rank
from flexmerge_cli.report.table import line_columns, say, table
from flexmerge_cli.report.text import human_bytes
from flexmerge_cli.report.vocabulary import show_vocabularies

EXTREMES = 5  # most and least similar blocks that are listed
SIZE_COLUMNS = 6  # of the blocks × groups table


def show_plan(facts: PlanFacts, value: dict[str, Any], *, every: bool) -> None:
    """Print tables and pictures on stdout."""
    settings, one = value["settings"], value["one_model_bytes"]
    say(f"{value['plan']}: a plan of {len(value['tasks'])} tasks of {value['base']}")
    say(
        f"{len(value['blocks'])} blocks ({settings['blocks']}), {value['merges']:,} merges: {settings['similarity']}, "
        f"{settings['linkage']} linkage, {settings['strategy']}; 1x = one model = {human_bytes(one)}"
    )
    for task in value["tasks"]:
        if "adapter" in task:
            say(f"{task['name']}: {adapter_words(task)}")
    show_low_rank(value["low_rank"], value["plan"])
    if "block" in value:
        _show_block(facts, value["block"])
        return
    counted = [(kind, found["tensors"], f"{found['bytes']:,}") for kind, found in value["classes"].items()]
    table(["class", "tensors", "bytes"], [row for row in counted if row[1]])
    show_vocabularies(value["vocabularies"])
    if len(value["tasks"]) > 1 and len(facts.cosine) > 1:
        print("cosine of every two task vectors, over all tensors that merge")
        draw.heat_map(facts.cosine, facts.plan.task_names, cosine_scale(facts.cosine))
    if value["merges"]:
        _show_sizes(value)
    else:
        say("nothing to merge: " + ("no tensor merges" if len(value["tasks"]) > 1 else "there is one task"))
    if value["blocks"]:
        _show_blocks(value, every=every)
        _show_extremes(value)
    show_options(value)


def _show_sizes(value: dict[str, Any]) -> None:
    sizes, one = value["curve"]["tensor_bytes"], max(1, value["one_model_bytes"])
    say("size after each merge, one dense value per merged block")
    labels = [f"{size / one:.2f}x {human_bytes(size):>7}" for size in (max(sizes), max(sizes) / 2, 0)]
    draw.curve(sizes, labels, below=("0 merges", f"{value['merges']:,} merges"))
    show_sizes(value["sizes"])


def _show_blocks(value: dict[str, Any], *, every: bool) -> None:
    between = [row["size"] for row in value["sizes"] if 0 < row["merges"] < value["merges"]]
    wide = line_columns() >= draw.WIDE
    spread = np.linspace(0, len(between) - 1, min(SIZE_COLUMNS if wide else 3, len(between))).round().astype(int)
    picked = [between[place] for place in spread]
    rows = []
    for block in value["blocks"]:
        pairs = block["similarity"]
        alike = [pairs["mean"], *(pairs[which]["similarity"] for which in ("least", "most"))] if pairs else [None] * 3
        similar = [draw.number(found) if pairs else "" for found in (alike if wide else alike[:1])]
        rows.append((block["name"], f"{block['parameters']:,}", *similar, *(block["groups"][size] for size in picked)))
    draw.long_table(
        ["block", "parameters", "similarity", *(("least", "most") if wide else ()), *picked],
        rows,
        every=every,
        title=f"blocks × groups at a size ({len(value['tasks'])} groups before the first merge, 1 after the last)",
    )


def _show_extremes(value: dict[str, Any]) -> None:
    ranked = sorted((b for b in value["blocks"] if b["similarity"]), key=lambda block: -block["similarity"]["mean"])
    if not ranked:
        return
    most = ranked[: min(EXTREMES, (len(ranked) + 1) // 2)]
    least = ranked[len(most) :][-EXTREMES:]
    for title, which, blocks in (("most similar blocks", "most", most), ("least similar blocks", "least", least[::-1])):
        rows = [
            (b["name"], draw.number(b["similarity"]["mean"]), _pair(b["similarity"][which]), b["merges"][0])
            for b in blocks
        ]
        columns = ["block", "similarity", f"{which} similar pair", "first merge"]
        draw.long_table(columns, rows, every=True, title=title, text=(2,))
    say("one block: --block NAME; all of them as pictures: --html report.html")


def _show_block(facts: PlanFacts, block: dict[str, Any]) -> None:
    say(f"block {block['name']}: {len(block['tensors'])} tensors, {block['parameters']:,} parameters")
    for name in block["tensors"]:
        say(f"  {name}")
    print("\nsimilarity of every two tasks; the eight heights span those of all blocks")
    draw.heat_map(np.array(block["similarity"]), facts.plan.task_names, facts.scale)
    rows = [
        (
            f"{merge['position']:,}",
            facts.scale.text(merge["similarity"]),
            " ".join(merge["left"]),
            " ".join(merge["right"]),
        )
        for merge in block["merges"]
    ]
    table(
        ["merge", "similarity", "of", "and"],
        rows,
        title=f"merges of the block, of {len(facts.plan.order):,}",
        text=(2, 3),
    )


def _pair(pair: dict[str, Any]) -> str:
    return f"{pair['tasks'][0]}, {pair['tasks'][1]} {draw.number(pair['similarity'])}"
