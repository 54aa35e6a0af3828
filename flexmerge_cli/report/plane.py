"""Shows the plane of `curve --plane`: a grid of scores, on the terminal and as heat maps."""

from collections.abc import Mapping
from typing import Any

from flexmerge_cli.report.html import cell_style, cells, legend, name, section, text
from flexmerge_cli.report.inspect_heat import Scale
from flexmerge_cli.report.table import say, table

MEAN = "mean of both"


def show_plane(value: Mapping[str, Any]) -> None:
    """Print the mean of both tasks' parts of their fine-tuned scores. value: the document of a curve with `plane`."""
    plane = value["plane"]
    of_a, of_b = plane["tasks"]
    rows = [[f"{b:g}", *(_text(value) for _, value in cells)] for b, cells in grid(plane, MEAN).items()]
    title = f"the base plus a·τ({of_a}) + b·τ({of_b}): mean of both tasks, of fine-tuned %"
    table(["b \\ a", *(f"{a:g}" for a in plane["places"])], rows, title=title)
    known = [point for point in plane["points"] if point["mean"]["normalised"] is not None]
    if known:
        best = max(known, key=lambda point: point["mean"]["normalised"])
        say(f"the best of these points is a = {best['a']:g}, b = {best['b']:g}")


def plane_section(value: Mapping[str, Any]) -> str:
    """Draw the grid as heat maps, of both tasks and of their mean."""
    plane = value["plane"]
    head = [f"<th scope=col>{a:g}</th>" for a in plane["places"]]
    scale, parts = Scale(low=0.0, high=1.0), []
    for title in (MEAN, *plane["tasks"]):
        rows = (
            (f"{b:g}", [f'<td style="{cell_style(scale, found or 0.0)}">{text(_text(found))}</td>' for _, found in row])
            for b, row in grid(plane, title).items()
        )
        parts.append(f"<h3>{name(title)}</h3>" + cells(head, rows, corner="b \\ a"))
    of_a, of_b = plane["tasks"]
    return section(
        "The plane of two tasks",
        legend("0 %", "100 % of the fine-tuned score"),
        *parts,
        note=f"Scores of the base plus a times the task vector of {of_a} and b times that of {of_b}, in percent of the "
        "fine-tuned score: the base is at (0, 0), the fine-tuned models are at (1, 0) and (0, 1), their average at "
        "(0.5, 0.5).",
    )


def grid(plane: Mapping[str, Any], of: str) -> dict[float, list[tuple[float, float | None]]]:
    """Map b, from the largest, to a and the normalised score of a task, or of both."""
    rows: dict[float, list[tuple[float, float | None]]] = {}
    for point in plane["points"]:
        found = point["mean"] if of == MEAN else point["tasks"][of]
        rows.setdefault(point["b"], []).append((point["a"], found["normalised"]))
    return dict(sorted(rows.items(), reverse=True))


def _text(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.1f}"
