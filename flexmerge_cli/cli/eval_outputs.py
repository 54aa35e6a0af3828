"""Writes the files that `eval` and `curve` make besides printing: `--csv`, `--html`, `--png`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.tidy import curve_csv, is_csv, scores_csv
from flexmerge_cli.report.curve_png import is_png, require_matplotlib
from flexmerge_cli.report.html import is_page
from flexmerge_cli.writing import check_file, write_file

Outputs = dict[str, Path]
"""Maps `csv`, `html` and `png` to the path to write."""
KINDS = {"csv": (is_csv, "a table of scores"), "html": (is_page, "a page"), "png": (is_png, "a picture")}


def check_outputs(outputs: Outputs, inputs: Sequence[Path | str | None], *, force: bool) -> None:
    """Check, before any work, that the files can be written. inputs: bundle, plan and specs.

    Raises UsageError, MachineError.
    """
    for kind, path in outputs.items():
        check_apart(path, inputs)
        replaceable, what = KINDS[kind]
        check_file(path, force=force, replaceable=replaceable, what=what)
    if len({path.absolute() for path in outputs.values()}) < len(outputs):
        raise UsageError("two outputs go to one file", hint="give --csv, --html and --png a file each")
    if "png" in outputs:
        require_matplotlib()


def write_outputs(document: dict[str, Any], outputs: Outputs, source: str) -> None:
    """Write the files. document: a curve, or scored models, which have no picture. source: what was scored."""
    is_curve = "points" in document
    if "csv" in outputs:
        write_file(outputs["csv"], curve_csv(document) if is_curve else scores_csv(document))
    if "html" in outputs:
        from flexmerge_cli.report.html_eval import curve_page
        from flexmerge_cli.report.html_scores import scores_page

        write_file(outputs["html"], curve_page(document, source) if is_curve else scores_page(document, source))
    if "png" in outputs:
        from flexmerge_cli.report.curve_png import write_png

        write_png(document, outputs["png"])
