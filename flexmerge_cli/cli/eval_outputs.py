"""The files that `eval` writes beside what it prints: `--csv`, `--html`, `--png`."""

from pathlib import Path
from typing import Any

from flexmerge_cli.cli.options import check_new_file
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.tidy import curve_csv, scores_csv
from flexmerge_cli.report.curve_png import require_matplotlib

Outputs = dict[str, Path]
"""`csv`, `html`, `png` -> where."""


def check_outputs(outputs: Outputs, *, force: bool) -> None:
    """Before any work. Raises UsageError, MachineError."""
    for path in outputs.values():
        check_new_file(path, force=force)
    if len({path.absolute() for path in outputs.values()}) < len(outputs):
        raise UsageError("two outputs go to one file", hint="--csv, --html and --png: a file each")
    if "png" in outputs:
        require_matplotlib()


def write_outputs(document: dict[str, Any], outputs: Outputs) -> None:
    """document: of a curve, or of models that were scored, which have no picture."""
    is_curve = "points" in document
    if "csv" in outputs:
        csv = curve_csv(document) if is_curve else scores_csv(document)
        outputs["csv"].write_text(csv, encoding="utf-8")
    if "html" in outputs:
        from flexmerge_cli.report.html_eval import curve_page
        from flexmerge_cli.report.html_scores import scores_page

        page = curve_page(document) if is_curve else scores_page(document)
        outputs["html"].write_text(page, encoding="utf-8")
    if "png" in outputs:
        from flexmerge_cli.report.curve_png import write_png

        write_png(document, outputs["png"])
