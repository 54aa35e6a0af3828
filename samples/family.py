"""What the scripts that compare methods share: a family of models on disk, and the options that name it."""

import argparse
from pathlib import Path

from flexmerge_cli import make_plan
from flexmerge_cli.formats.plan_file import Plan


def arguments(
    doc: str | None, *, picture: bool = True, methods: bool = False, calibrations: bool = False
) -> argparse.Namespace:
    """`--family` (base/, tasks/NAME/, eval.yaml; by default the digits), `--json`, and the options asked for."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", type=Path, default=Path(__file__).parent / "digits")
    if picture:
        parser.add_argument("--picture", type=Path)
    if methods:
        parser.add_argument("--method", action="append", default=[])
    if calibrations:
        parser.add_argument("--calibration", type=Path, action="append", default=[])
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def plan_of(family: Path, folder: Path | None = None) -> Plan:
    """The plan of all tasks of a family; with a folder, it is saved there as plan.json."""
    tasks = {path.name: path for path in sorted((family / "tasks").iterdir())}
    return make_plan(family / "base", tasks, output=folder / "plan.json" if folder else None)
