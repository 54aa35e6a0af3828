"""Shows a curve as one page: scores against bytes by method and task, the best at each size, the order, all points."""

from pathlib import Path
from typing import Any

from flexmerge_cli.evaluation.curve_record import NORMALISED
from flexmerge_cli.evaluation.evaluate import format_counts, one_metric
from flexmerge_cli.report.curve import ENSEMBLE_HEADS, ensemble_rows, format_interval, format_value
from flexmerge_cli.report.curve_series import Series, metric_label, ranking, series_of, sizes_of
from flexmerge_cli.report.html import facts, name, page, section, table, text, today
from flexmerge_cli.report.html_chart import Tick, chart, dots, nice_ticks
from flexmerge_cli.report.html_eval_chart import curve_chart, mean_of, of_task, series_css
from flexmerge_cli.report.plane import plane_section
from flexmerge_cli.report.text import human_bytes

MAX_TASK_COLUMNS = 12
KINDS = (("attention", "#0072b2"), ("mlp", "#d55e00"), ("norm", "#009e73"), ("others", "#555555"))


def curve_page(record: dict[str, Any], source: str) -> str:
    """Make the whole document. source: the name of the plan."""
    series = series_of(record)
    counts = record["evaluations"]
    metrics = ", ".join(sorted({task["metric"] for task in record["tasks"].values()}))
    subtitle = facts(
        [
            ("tasks", f"{len(record['tasks'])} of {record['num_models']} models"),
            ("metric", text(metrics)),
            ("one model", human_bytes(record["one_model_bytes"])),
            ("methods", str(len(series))),
            ("evaluations", f"{counts['asked']:,}: {format_counts(counts)}"),
            ("plan", f"<span class=path>{text(record['plan'][:16])}…</span>"),
            *spec_facts(record),
        ]
    )
    sections = [eval_style(series), *verdicts(record), _curve(series, record), _tasks(series, record)]
    sections += [_ranking(series, record), _order(record), _references(record), _ensembles(record)]
    sections += [plane_section(record) if "plane" in record else "", _points(record)]
    title = f"{source}: accuracy against size, {len(record['tasks'])} tasks"
    return page(title, subtitle, filter(None, sections))


def spec_facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Say what the scores rest on, and when the page was made."""
    spec = document.get("spec")
    named = [("spec", f"{name(spec['path'])} <span class=path>{text(spec['sha256'][:16])}…</span>")] if spec else []
    return [*named, ("page of", today())]


def eval_style(series: list[Series]) -> str:
    """Return the style sheet of these pages and the colours of the methods."""
    css = Path(__file__).with_name("eval.css").read_text(encoding="utf-8")
    return f"<style>\n{css}{series_css(series)}\n</style>"


def verdicts(record: dict[str, Any]) -> list[str]:
    """Return the verdicts, which must not be overlooked."""
    found = []
    if record.get("data_dependent"):
        chosen = record["data_dependent"]
        found.append(
            f"<p class=warn><b>Data-dependent:</b> {text(chosen['arguments'])} chosen on {text(chosen['spec'])}, which "
            "is not the data reported here.</p>"
        )
    for key, title in (("gate", "Gate"), ("chosen", "Chosen")):
        if record.get(key):
            found.append(f"<p class=warn><b>{title}:</b> {text(record[key]['message'])}</p>")
    return found


def _curve(series: list[Series], record: dict[str, Any]) -> str:
    mean = record["mean"]
    picture = curve_chart(
        series, record, mean_of, fine_tuned=mean["fine_tuned"], base=mean["base"], height="min(34rem, 70vh)",
        says="mean score against bytes of tensor data, one line per method; all numbers are in the table below",
    )  # fmt: skip
    return section(
        "Accuracy against size",
        picture,
        _methods(series),
        note=f"Mean over the tasks: {metric_label(record)}; bands are 95 % intervals. Circles show what is "
        "possible without merging: copies of all models in fewer bits. Pick a method to see it alone.",
    )


def _methods(series: list[Series]) -> str:
    """Make the legend, which highlights one method."""
    items = ["<label><input type=radio name=pick id=pickall checked />all</label>"]
    items += [
        f"<label><input type=radio name=pick id=pick{place} /><span class=m{place}>{one.style.marker}</span> "
        f"{name(one.method, 40)}</label>"
        for place, one in sorted(enumerate(series), key=lambda item: item[1].is_grey)
    ]
    return f"<fieldset class=methods>{''.join(items)}</fieldset>"


def _tasks(series: list[Series], record: dict[str, Any]) -> str:
    panels = []
    for task, reference in record["tasks"].items():
        picture = curve_chart(
            series, record, of_task(task), fine_tuned=reference["fine_tuned"], base=reference["base"], height="11rem",
            says=f"{reference['metric']} of {task} against bytes", metric=reference["metric"],
        )  # fmt: skip
        panels.append(
            f"<div><h3>{name(task, 30)} <span class=note>{text(reference['metric'])}</span></h3>{picture}</div>"
        )
    return section(
        "By task",
        f"<div class=panels>{''.join(panels)}</div>",
        note="The same lines for each task, on a scale of its own. Solid: the fine-tuned model; dotted: the base.",
    )


def _ranking(series: list[Series], record: dict[str, Any]) -> str:
    sizes = sizes_of(record)
    if len(series) < 2 or not sizes:
        return ""
    places = {size: ranking(record, size) for size in sizes}
    head = "<th scope=col class=l>method</th>" + "".join(f"<th scope=col>{text(size)}</th>" for size in sizes)
    order = sorted(series, key=lambda one: (sum(places[s].get(one.method, len(series)) for s in sizes), one.method))
    rows = []
    for one in order:
        cells = []
        for size in sizes:
            place = places[size].get(one.method)
            cells.append(f"<td{' class=first' if place == 1 else ''}>{'–' if place is None else place}</td>")
        rows.append(f"<tr><th scope=row>{name(one.method, 40)}</th>{''.join(cells)}</tr>")
    return section(
        "Ranking at each size",
        f"<div class=scroll><table class=rank><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>",
        note="1 is the best mean at that size; methods share a rank where their 95 % intervals overlap with the best "
        "of them; – is out of the method's reach.",
    )


def _order(record: dict[str, Any]) -> str:
    blocks = [block for block in record["order"] if block["position"] is not None]
    if not blocks:
        return ""
    total = max(1, len(record["order"]) - 1)
    groups: dict[str, list[tuple[float, float]]] = {kind: [] for kind, _ in KINDS}
    for index, block in enumerate(record["order"]):
        if block["position"] is not None:
            groups[_kind(block["block"])].append((index / total, 1 - block["position"]))
    body = "".join(dots(groups[kind], colour, 9) for kind, colour in KINDS if groups[kind])
    keys = "".join(
        f'<span><span style="color:{colour}">●</span> {kind}</span>' for kind, colour in KINDS if groups[kind]
    )
    picture = chart(
        body,
        says="mean place of each block's merges in the order, against its depth",
        height="15rem",
        left=[Tick(place=1, label="first"), Tick(place=0.5, label="", line=True), Tick(place=0, label="last")],
        below=[Tick(place=tick / total, label=f"{tick:g}") for tick in nice_ticks(0, total, 7)],
        up="mean place of a block's merges in the order",
        across="block, from the first to the last of the model",
    )
    return section(
        "Merge order along depth",
        f"<p class=legend>{keys}</p>",
        picture,
        note="Each dot is a block: how early its merges come, on average. What merges first is most alike.",
    )


def _kind(block: str) -> str:
    lowered = block.lower()
    if "norm" in lowered or "ln_" in lowered:
        return "norm"
    if "attention" in lowered or "attn" in lowered:
        return "attention"
    return "mlp" if "mlp" in lowered or "ffn" in lowered or "feed_forward" in lowered else "others"


def _references(record: dict[str, Any]) -> str:
    rows = []
    for task, found in record["tasks"].items():
        metric = found["metric"]
        cells = [name(task), text(metric), f"{found['n']:,}", text(_split(found))]
        for who in ("fine_tuned", "base"):
            ends = format_interval(found[f"{who}_interval"], metric)
            cells.append(format_value(found[who], metric) + (f" ({ends})" if ends else ""))
        rows.append(cells)
    return section("References", table(["task", "metric", "n", "split", "fine-tuned", "base"], rows, left=2))


def _ensembles(record: dict[str, Any]) -> str:
    if not record.get("ensembles"):
        return ""
    rows = [[text(cell) for cell in row] for row in ensemble_rows(record)]
    note = "Fine-tuned models with the same labels, all of which run on each example. Means are over their tasks."
    return section("Ensembles", table(ENSEMBLE_HEADS, rows, words=(len(ENSEMBLE_HEADS) - 1,)), note=note)


def _split(found: dict[str, Any]) -> str:
    return next((score["split"] or "" for score in found["scores"].values()), "")


def _points(record: dict[str, Any]) -> str:
    tasks = list(record["tasks"]) if len(record["tasks"]) <= MAX_TASK_COLUMNS else []
    rows, metric = [], one_metric(record["tasks"]) or NORMALISED
    for point in (*record["points"], *record["alternatives"]):
        mean = point["mean"]
        rows.append(
            [
                name(point["method"], 40),
                text(", ".join(point["sizes"]) or "own"),
                f"{point['factor']:.2f}x",
                f"{point['bytes']:,}",
                f"{point['total_bytes']:,}",
                format_value(mean["value"], metric),
                format_interval(mean["interval"], metric),
                "" if mean["normalised"] is None else f"{100 * mean['normalised']:.1f}",
                *(format_value(point["tasks"][task]["value"], record["tasks"][task]["metric"]) for task in tasks),
            ]
        )
    heads = ["method", "asked", "is", "bytes", "on disk", "mean", "95 %", "of fine-tuned %", *tasks]
    missing = "".join(
        f"<p class=note>{name(item['method'])} does not reach {text(item['size'])}.</p>"
        for item in record["unreached"][:50]
    )
    return section("All points", table(heads, rows, left=2), missing)
