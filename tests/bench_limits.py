"""`python -m tests.bench all`: what each part may take of a bare loop's time, and what it takes."""

from collections.abc import Callable
from pathlib import Path

LIMITS = (
    # what, its part and that of the bare loop (None: seconds), below --folder, limit
    ("plan, 8 tasks, gram", "our-plan-gram", "bare-plan", "", 1.8),
    ("plan, 8 tasks", "our-plan", "bare-plan", "", 1.8),
    ("plan, 30 tasks", "our-plan", "bare-plan", "thirty", 1.3),
    ("merge average 1x", "our-merge", "bare-merge", "", 1.2),
    ("merge ties 1x", "our-merge-ties", "bare-merge", "", 2.0),
    ("merge emr 2.2x", "our-merge-emr", "bare-merge", "", 2.0),
    ("auto 1x of 30 tasks", "our-auto", None, "thirty", 2.0),
    ("a task of average 2x", "view-dense", "bare-load", "", 1.3),
    ("a task of low_bit 4", "view-coded", "bare-load", "", 1.3),
    ("digests, average 2x", "view-dense-verified", "view-dense", "", 1.15),
    ("digests, low_bit 4", "view-coded-verified", "view-coded", "", 1.15),
)


def print_limits(run_part: Callable[[str, Path], dict[str, float]], folder: Path, repeat: int) -> bool:
    """Print each figure beside its limit, ours and the bare loop in turn; return whether all keep theirs.

    Of some repeats the fastest of each counts; the ratio is of wall times, that of CPU times stands beside it.
    """
    print(f"{'':21} {'ours':>15} {'bare':>15} {'time':>6} {'CPU':>6} {'limit':>6}  peak")
    kept = True
    made = set()
    for what, ours, bare, below, limit in LIMITS:
        place = folder / below
        for needed in ("our-plan", "our-bundles") if ours.startswith("view") else ("our-plan",):
            if ours != needed and (needed, place) not in made:
                run_part(needed, place)
                made.add((needed, place))
        best: dict[str, dict[str, float]] = {}
        for _ in range(repeat):
            for name in filter(None, (bare, ours)):
                found = run_part(name, place)
                best[name] = {key: min(value, best.get(name, found)[key]) for key, value in found.items()}
        one, other = best[ours], best.get(bare or "", {"seconds": 1.0, "cpu": 1.0})
        ratios = [one[key] / other[key] for key in ("seconds", "cpu")]
        kept &= ratios[0] <= limit
        times = [f"{each['seconds']:5.2f} s, {each['cpu']:5.2f}" for each in (one, other)]
        print(
            f"{what:21} {times[0]:>15} {times[1] if bare else '':>15} {ratios[0]:6.2f} {ratios[1]:6.2f} {limit:6.2f}"
            f"  {one['peak_bytes'] / 1e6:.0f} MB{'' if ratios[0] <= limit else '  OVER'}",
            flush=True,
        )
    return kept
