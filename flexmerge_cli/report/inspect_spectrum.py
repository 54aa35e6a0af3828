"""Shows `inspect bundle/ --spectrum plan.json`: how unevenly frequencies are filled, block by block."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flexmerge_cli.evaluation.spectrum import BlockSpectrum
from flexmerge_cli.report.html import block_name, section, table, text
from flexmerge_cli.report.inspect_draw import long_table, number

TITLE = "variance of amplitudes over frequencies, over their squared mean"
COLUMNS = ("block", "methods", "tasks'\nown", "bundle's", "change")


def spectrum_value(blocks: Sequence[BlockSpectrum]) -> list[dict[str, Any]]:
    """Return the value for --json."""
    return [
        {
            "block": block.name,
            "methods": list(block.methods),
            "pairs": block.pairs,
            "own": block.own,
            "stored": block.stored,
            "change": block.change,
        }
        for block in blocks
    ]


def show_spectrum(value: Sequence[dict[str, Any]], *, every: bool) -> None:
    """Print a table on stdout, and the mean of all blocks below it."""
    long_table(COLUMNS, _rows(value), every=every, title=TITLE, text=(1,))


def spectrum_section(value: Sequence[dict[str, Any]]) -> str:
    """Make the section of a page."""
    rows = [[block_name(row[0]), *map(text, row[1:])] for row in _rows(value)]
    return section(
        "Frequencies",
        table([column.replace("\n", " ") for column in COLUMNS], rows, words=(1,)),
        note="The variance of the amplitudes of a change's two-dimensional Fourier transform over all frequencies, "
        "divided by their squared mean: of the tasks' own changes and of what the bundle gives back. Means over the "
        "block's matrices and tasks.",
    )


def _rows(value: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (row["block"], ", ".join(row["methods"]), number(row["own"]), number(row["stored"]), _change(row["change"]))
        for row in value
    ]
    known = [row for row in value if row["pairs"]]
    if len(known) > 1:
        own, stored = np.mean([(row["own"], row["stored"]) for row in known], axis=0).tolist()
        rows.append(("mean of all blocks", "", number(own), number(stored), _change(stored / own - 1 if own else None)))
    return rows


def _change(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:+.1f} %"
