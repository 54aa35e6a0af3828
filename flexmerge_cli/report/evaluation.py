"""Shows the scores of a bundle, or of its sources, as a table."""

from typing import Any

from flexmerge_cli.evaluation.evaluate import format_counts, means, one_metric
from flexmerge_cli.evaluation.gate import Outcome
from flexmerge_cli.report.cross import show_cross
from flexmerge_cli.report.router import show_routed
from flexmerge_cli.report.score_text import DASH, format_score, interval_cells, scale_of
from flexmerge_cli.report.table import say, table


def show_evaluation(value: dict[str, Any]) -> None:
    columns, rows = score_table(value)
    table(columns, rows, text=(1,))
    for title, columns, rows, words in tables_apart(value):
        table(columns, rows, title=title, text=range(words))
    if "cross" in value:
        show_cross(value)
    if "router" in value:
        show_routed(value)
    for line in remarks(value):
        say(line)
    say(f"scores: {format_counts(value['evaluations'])}")
    if "gate" in value:
        show_gate(value)
    if "factor" in value:
        say(f"bundle of {value['factor']:.4f}x, {value['stored_bytes']:,} bytes of tensors")


def show_gate(value: dict[str, Any]) -> None:
    """Print the whole verdict and its evidence."""
    gate, spec = value["gate"], value["spec"]
    for task in gate["tasks"].values():
        say(f"{task['message']}, limit {task['limit']}: {task['outcome']}")
    for label, tasks in (("not scored, as the spec says", gate["not_scored"]), ("forgotten", gate["forgotten"])):
        if tasks:
            say(f"{label}: {', '.join(tasks)}")
    say(f"spec {spec['path']}, sha256 {spec['sha256']}")
    say("data: " + ", ".join(f"{name} {record['data'] or DASH}" for name, record in value["tasks"].items()))
    if gate["outcome"] == Outcome.PASS:
        say(f"gate: {gate['message']}")


Apart = tuple[str, list[str], list[list[str]], int]
"""Title, heads, rows, and how many columns are text."""


def tables_apart(value: dict[str, Any]) -> list[Apart]:
    """Return the tables besides that of the tasks: of unseen tasks, and of corrupted data."""
    found: list[Apart] = []
    if "unseen" in value:
        records = {f"{name} ({record['head']})": record for name, record in value["unseen"].items()}
        columns, rows = score_table({"tasks": records, "mean": value["unseen_mean"]})
        found.append(("unseen tasks, with the task whose head they have", columns, rows, 2))
    if "corrupted" in value:
        found += _robustness(value)
    return found


def _robustness(value: dict[str, Any]) -> list[Apart]:
    """Make a row per corruption below that of clean data: means over the tasks with images, and the score of each."""
    corrupted = value["corrupted"]
    tasks = list(next(iter(corrupted.values()))["tasks"])
    clean = {task: value["tasks"][task] for task in tasks}
    of_rows = {"none": {"tasks": clean, "mean": means(clean)}} | corrupted
    whos = [who for who in ("merged", "fine_tuned", "base") if _any(clean, who)]
    own = whos[0]
    heads = ["corruption", *(who.replace("_", "-") for who in whos), *["kept %"] * (own == "merged")]
    of_means, of_tasks = [], []
    for name, found in of_rows.items():
        scale = scale_of(one_metric(found["tasks"]) or "")
        row = [name, *(format_score(found["mean"][who], scale) for who in whos)]
        of_means.append(row + [format_score(found["mean"]["normalised"], 100.0)] * (own == "merged"))
        each = (format_score(record[own], scale_of(record["metric"])) for record in found["tasks"].values())
        of_tasks.append([name, *each])
    return [
        ("corrupted data, means over tasks", heads, of_means, 1),
        (f"corrupted data, {own.replace('_', '-')} models", ["corruption", *tasks], of_tasks, 1),
    ]


def score_table(value: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows: task, metric, n, merged ± half its 95 % interval, fine-tuned, base, part of the fine-tuned
    score.

    The first two columns are text.
    """
    records, mean = value["tasks"], value["mean"]
    has_merged = any(record["merged"] is not None for record in records.values())
    worst = _worst(records) if has_merged and len(records) > 1 else None
    whos = ["merged"] * has_merged + [who for who in ("fine_tuned", "base") if _any(records, who)]
    heads = {"merged": ["merged", "±", "95 %"], "fine_tuned": ["fine-tuned"], "base": ["base"]}
    rows = []
    for name, record in records.items():
        scale = scale_of(record["metric"])
        row = [name + (" (worst)" if name == worst else ""), record["metric"], str(record["n"] or "")]
        for who in whos:
            row.append(format_score(record[who], scale))
            if who == "merged":
                row += interval_cells(record["merged_interval"], scale)
        if has_merged:
            row.append(format_score(record["normalised"], 100.0))
        rows.append(row)
    if len(records) > 1:
        scale = scale_of(one_metric(records) or "")
        row = ["mean", "", ""]
        for who in whos:
            row += ["" if mean[who] is None else format_score(mean[who], scale)] + ["", ""] * (who == "merged")
        rows.append(row + ([format_score(mean["normalised"], 100.0)] if has_merged else []))
    columns = [head for who in whos for head in heads[who]] + ["kept %"] * has_merged
    return ["task", "metric", "n", *columns], rows


def remarks(value: dict[str, Any]) -> list[str]:
    """Return further metrics of each task and remarks, one line per model."""
    found = []
    for name, record in (value["tasks"] | value.get("unseen", {})).items():
        for who, scored in record["scores"].items():
            for one in (scored, *scored["others"]):
                notes = [] if one is scored else [_format_other(one)]
                notes += one["notes"]
                if notes:
                    found.append(f"{name}, {who.replace('_', '-')}: {'; '.join(notes)}")
    return found


def _format_other(scored: dict[str, Any]) -> str:
    return f"{format_score(scored['value'], scale_of(scored['metric']))} {scored['metric']}"


def _worst(records: dict[str, Any]) -> str:
    """Return the task that keeps the least of its fine-tuned score or, without that score, has the lowest score."""

    def kept(name: str) -> float:
        record = records[name]
        part = record["normalised"]
        if part is not None or record["merged"] is None:
            return -1.0 if part is None else float(part)
        return float(record["merged"]) * (1 if record["higher_is_better"] else -1)

    return min(records, key=kept)


def _any(records: dict[str, Any], who: str) -> bool:
    return any(record[who] is not None for record in records.values())
