"""Shows the differences of two plans or two bundles as tables. bundle/differences.py makes the value."""

from collections.abc import Callable, Mapping
from typing import Any

from flexmerge_cli.bundle.kind import SourceKind
from flexmerge_cli.report.table import say, table

DIFFERENT = 7  # exit code
ROWS = 20  # of blocks, without --verbose


def show_diff(value: dict[str, Any], *, every: bool = False) -> None:
    """Print the differences, or one line that says there are none. every: all rows of long tables."""
    a, b = value["a"]["source"], value["b"]["source"]
    if value["equal"]:
        say(f"{a} and {b} hold the same")
        return
    say(f"A: {a}, {value['a']['tasks']} tasks")
    say(f"B: {b}, {value['b']['tasks']} tasks")
    print()
    _show("of the whole", _rows(value["settings"]))
    tasks = value["tasks"]
    missing = {name: [True, None] for name in tasks["only_a"]} | {name: [None, True] for name in tasks["only_b"]}
    changed = {f"{name}: {key}": pair for name, pairs in tasks["changed"].items() for key, pair in pairs.items()}
    _show("task", _rows(missing | changed))
    if value["values"]:
        table(
            ["task", "tensors with\nother values", "bytes of them", "other\nside files"],
            [
                (name, f"{len(found['tensors'])} of {found['of']}", f"{found['bytes']:,}", len(found["files"]))
                for name, found in value["values"].items()
            ],
        )
    words = _groups if value["kind"] == SourceKind.BUNDLE else _merges
    blocks = [(name, *words(pair)) for name, pair in value["blocks"].items()]
    _show("block", blocks if every else blocks[:ROWS])
    if not every and len(blocks) > ROWS:
        say(f"{len(blocks) - ROWS} more blocks differ; -v lists them all")
    say(f"A and B differ in: {', '.join(value['keys'])}")


def _show(what: str, rows: list[tuple[str, str, str]]) -> None:
    if rows:
        table([what, "A", "B"], rows, text=(1, 2))


def _rows(pairs: Mapping[str, list[Any]]) -> list[tuple[str, str, str]]:
    return [(name, _cell(one), _cell(other)) for name, (one, other) in pairs.items()]


def _groups(pair: list[list[dict[str, Any]] | None]) -> tuple[str, str]:
    """Describe the groups of both sides, with the arguments of their methods if nothing else differs."""
    one, other = (_words(groups, lambda method: method.partition(":")[0]) for groups in pair)
    return (one, other) if one != other else (_words(pair[0], str), _words(pair[1], str))


def _words(groups: list[dict[str, Any]] | None, shown: Callable[[str], str]) -> str:
    """Describe groups. `shown` maps a method to what is shown of it."""
    if groups is None:
        return "–"
    return " | ".join(
        " ".join(
            task if group["bits"] is None else f"{task}:{group['bits'].get(task, 'exact')}" for task in group["tasks"]
        )
        + (f" ({shown(group['method'])})" if group["method"] is not None else "")
        for group in groups
    )


def _merges(pair: list[list[list[list[str]]] | None]) -> tuple[str, str]:
    one, other = (
        "–" if merges is None else ", ".join(f"{'+'.join(left)} & {'+'.join(right)}" for left, right in merges)
        for merges in pair
    )
    return one, other


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}"
    return ", ".join(map(str, value)) or "–" if isinstance(value, list) else str(value)
