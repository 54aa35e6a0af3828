"""Shows how a router was fitted, and scores with it, as tables and on the page."""

from collections.abc import Mapping
from typing import Any

from flexmerge_cli.report.html import cell_style, cells, legend, name, section, text
from flexmerge_cli.report.html import table as page_table
from flexmerge_cli.report.inspect_bundle import router_message
from flexmerge_cli.report.inspect_heat import Scale
from flexmerge_cli.report.table import say, table

HEADS = ("task", "n", "routed\nright %", "true\ntask", "routed", "random\ntask")


def show_router(value: dict[str, Any]) -> None:
    """Print how a router was fitted. value: the document of `route`."""
    router = value["router"]
    table(["task", "examples"], [[task, f"{count:,}"] for task, count in router["examples"].items()])
    say(router_message(router))


def show_routed(value: Mapping[str, Any]) -> None:
    """Print scores with the router, with the true task, and with a random one. value: from `eval --router`."""
    routed = value["router"]
    title = f"{routed['metric']} by who chooses the task; {routed['kind']} router, features of {routed['features']}"
    table(HEADS, _score_rows(routed), title=title)
    names = list(routed["tasks"])
    table(
        ["examples of", *names],
        [[task, *(f"{record['to'][name]:,}" for name in names)] for task, record in routed["tasks"].items()],
        title="the tasks that they were routed to",
    )
    say(_cost(routed))


def routed_section(value: Mapping[str, Any]) -> str:
    """Draw the same for the page. The colour of a cell is the part of a task's examples that it has."""
    routed = value["router"]
    rows = [[name(row[0]), *map(text, row[1:])] for row in _score_rows(routed)]
    parts = Scale(low=0.0, high=1.0)

    def sent(record: Mapping[str, Any]) -> list[str]:
        found, most = record["to"].values(), max(1, record["n"])
        return [f'<td style="{cell_style(parts, count / most)}">{count:,}</td>' for count in found]

    head = (f"<th scope=col>{name(task)}</th>" for task in routed["tasks"])
    grid = cells(head, ((name(task), sent(record)) for task, record in routed["tasks"].items()))
    return section(
        "When nobody names the task",
        page_table([word.replace("\n", " ") for word in HEADS], rows),
        "<h3>Where the router sends the examples of each task</h3>",
        f"{legend('none', 'all')}{grid}",
        note=f"{routed['metric'].capitalize()} if the router, the user or chance chooses the task. A {routed['kind']} "
        f"router reads features of {routed['features']}; {_cost(routed)}.",
    )


def _score_rows(routed: Mapping[str, Any]) -> list[list[str]]:
    def row(task: str, record: Mapping[str, Any]) -> list[str]:
        numbers = (f"{100 * record[key]:.1f}" for key in ("routed_right", "true", "routed", "random"))
        return [task, f"{record['n']:,}" if "n" in record else "", *numbers]

    return [*(row(task, record) for task, record in routed["tasks"].items()), row("mean", routed["mean"])]


def _cost(routed: Mapping[str, Any]) -> str:
    return f"routing takes {1000 * routed['seconds_per_example']:.2f} ms per example"
