"""Methods that see a few unlabelled examples, beside two that see none, on one family: a table in markdown.

    python samples/compare_data.py [--family samples/digits] [--json]

Needs the `eval` extra, and `calib.yaml` and `eval.yaml` in the family; two and a half minutes of processor time. Mean
accuracy over the tasks in percent, with the 95 % interval. Sizes are of tensor data, in models. Coefficients are found
once, for all sizes; RegMean++ measures its inputs for each size.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from family import arguments, plan_of

from flexmerge_cli import calibrate, draw_curve, tune

SIZES = ("1x", "1.5x", "2x")
DATA_FREE = ("average", "tsv_m")
READERS = ("fisher", "regmean")
TUNED = {
    "AdaMerging, by block": "adamerging:granularity=block",
    "AdaMerging, by task": "adamerging:granularity=task",
    "Frank-Wolfe, by task": "fw_merging:granularity=task",
    "Frank-Wolfe, by block": "fw_merging:granularity=block",
    "Concrete, gates of blocks": "concrete",
}
Row = dict[str, dict[str, Any]]
"""Maps each size to `value` and `interval`, parts of 1."""


def compare(family: Path) -> dict[str, Row]:
    """Score every method at every size."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan_of(family, folder)
        plan, examples = folder / "plan.json", family / "calib.yaml"
        methods = {name: name for name in (*DATA_FREE, *READERS)}
        calibrate(plan, examples, folder / "calibration")
        for number, (label, method) in enumerate(TUNED.items()):
            print(label, file=sys.stderr)
            tune(plan, examples, folder / f"{number}.json", method=method)
            methods[label] = f"weighted_average:weights=@{folder / f'{number}.json'},normalize=count"

        def scored(methods: list[str], sizes: str, calibration: Path) -> list[Any]:
            spec = family / "eval.yaml"
            found = draw_curve(plan, spec, methods=methods, sizes=sizes, calibration=str(calibration))
            return list(found["points"])

        points = scored(list(methods.values()), ",".join(SIZES), folder / "calibration")
        rows: dict[str, Row] = {
            label: {size: point["mean"] for point in points if point["method"] == method for size in point["sizes"]}
            for label, method in methods.items()
        }
        rows["RegMean++"] = {}
        for size in SIZES:
            print(f"RegMean++ at {size}", file=sys.stderr)
            calibrate(plan, examples, folder / size, through="regmean", size=size)
            rows["RegMean++"][size] = scored(["regmean"], size, folder / size)[0]["mean"]
    return rows


def show(rows: dict[str, Row]) -> None:
    print(f"| method | {' | '.join(SIZES)} |\n|{' --- |' * (len(SIZES) + 1)}")
    for label, row in rows.items():
        cells = [[100 * number for number in (row[size]["value"], *row[size]["interval"])] for size in SIZES]
        print(f"| {label} | {' | '.join(f'{value:.1f} [{low:.1f}, {high:.1f}]' for value, low, high in cells)} |")


def main() -> None:
    given = arguments(__doc__, picture=False)
    found = compare(given.family)
    print(json.dumps(found, indent=2)) if given.json else show(found)


if __name__ == "__main__":
    main()
