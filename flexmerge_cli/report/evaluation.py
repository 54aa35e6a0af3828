"""What `eval` tells of a bundle, or of its sources, as a table."""

from typing import Any

from flexmerge_cli.evaluation.metrics import METRICS
from flexmerge_cli.report.text import table

DASH = "–"


def show_evaluation(value: dict[str, Any]) -> None:
    """Task, n, metric, merged ± half its 95 % interval, fine-tuned, base, and the part of the fine-tuned score."""
    records, mean = value["tasks"], value["mean"]
    has_merged = any(record["merged"] is not None for record in records.values())
    worst = _worst(records) if has_merged and len(records) > 1 else None
    whos = ["merged"] * has_merged + [who for who in ("fine_tuned", "base") if _any(records, who)]
    heads = {"merged": ["merged", "±", "95 %"], "fine_tuned": ["fine-tuned"], "base": ["base"]}
    rows = []
    for name, record in records.items():
        scale = _scale(record["metric"])
        row = [name + (" (worst)" if name == worst else ""), record["metric"], record["n"] or ""]
        for who in whos:
            row.append(_number(record[who], scale))
            if who == "merged":
                row += _interval(record["merged_interval"], scale)
        if has_merged:
            row.append(_number(record["normalised"], 100.0))
        rows.append(row)
    metrics = {record["metric"] for record in records.values()}
    if len(records) > 1:
        # A mean over different metrics says nothing; one over parts of the fine-tuned scores does.
        same = len(metrics) == 1
        row = ["mean", "", ""]
        for who in whos:
            row += [_number(mean[who], _scale(next(iter(metrics)))) if same else ""] + ["", ""] * (who == "merged")
        rows.append(row + ([_number(mean["normalised"], 100.0)] if has_merged else []))
    columns = [head for who in whos for head in heads[who]] + ["of it %"] * has_merged
    table(["task", "metric", "n", *columns], rows, left=2)
    for name, record in records.items():
        for who, scored in record["scores"].items():
            for one in (scored, *scored["others"]):
                _tell(name, who, one, is_first=one is scored)
    if "factor" in value:
        print(f"bundle of {value['factor']:.4f}x, {value['stored_bytes']:,} bytes of tensors")


def _tell(task: str, who: str, scored: dict[str, Any], *, is_first: bool) -> None:
    """Further metrics of a task, and what was remarkable."""
    told = [] if is_first else [f"{_number(scored['value'], _scale(scored['metric']))} {scored['metric']}"]
    told += scored["notes"]
    if told:
        print(f"{task}, {who.replace('_', '-')}: {'; '.join(told)}")


def _worst(records: dict[str, Any]) -> str:
    """That keeps the least of its fine-tuned score; where there is none, has the least score itself."""

    def kept(name: str) -> float:
        record = records[name]
        part = record["normalised"]
        if part is not None or record["merged"] is None:
            return -1.0 if part is None else float(part)
        return float(record["merged"]) * (1 if record["higher_is_better"] else -1)

    return min(records, key=kept)


def _any(records: dict[str, Any], who: str) -> bool:
    return any(record[who] is not None for record in records.values())


def _scale(metric: str) -> float:
    """100 for what is told in percent."""
    try:
        return 100.0 if METRICS[metric].percent else 1.0
    except KeyError:
        return 1.0


def _number(value: float | None, scale: float) -> str:
    if value is None:
        return DASH
    return f"{scale * value:.1f}" if scale == 100.0 else f"{value:.4g}"


def _interval(ends: list[float] | None, scale: float) -> list[str]:
    if ends is None or ends[0] == ends[1]:
        return [DASH, DASH]
    low, high = ends
    return [_number((high - low) / 2, scale), f"{_number(low, scale)} … {_number(high, scale)}"]
