"""What `route` and `eval --router` show of a router, as tables."""

from typing import Any

from flexmerge_cli.report.inspect_bundle import router_message
from flexmerge_cli.report.table import say, table


def show_router(value: dict[str, Any]) -> None:
    """Print how a router was fitted. value: the document of `route`."""
    router = value["router"]
    table(["task", "examples"], [[task, f"{count:,}"] for task, count in router["examples"].items()])
    say(router_message(router))


def show_routed(value: dict[str, Any]) -> None:
    """Print scores with the router, with the true task, and with a random one. value: from `eval --router`."""
    routed = value["router"]

    def row(name: str, record: dict[str, Any]) -> list[str]:
        numbers = (f"{100 * record[key]:.1f}" for key in ("routed_right", "true", "routed", "random"))
        return [name, f"{record['n']:,}" if "n" in record else "", *numbers]

    rows = [row(task, record) for task, record in routed["tasks"].items()]
    table(
        ["task", "n", "routed\nright %", "true\ntask", "routed", "random\ntask"],
        [*rows, row("mean", routed["mean"])],
        title=f"{routed['metric']} by who chooses the task; {routed['kind']} router, features of {routed['features']}",
    )
    names = list(routed["tasks"])
    table(
        ["examples of", *names],
        [[task, *(f"{record['to'][name]:,}" for name in names)] for task, record in routed["tasks"].items()],
        title="the tasks that they were routed to",
    )
    say(f"routing takes {1000 * routed['seconds_per_example']:.2f} ms per example")
