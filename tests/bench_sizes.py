"""How often `merge --sizes` reads the weights, beside single merges: `python -m tests.bench_sizes [METHOD…]`."""

import sys
import tempfile
from pathlib import Path

from .bundle.test_resume import counted
from .families import plain, write_family
from .program import succeeds

SIZES = ("1.5x", "2x", "4x")
METHODS = ("average", "tsv_m", "auto", "ties")


def main(root: Path, methods: list[str]) -> None:
    folders = write_family(root, plain(num_tasks=8, layers=6, width=64))
    succeeds("plan", *folders.arguments, "-o", root / "plan.json", "-q")
    weights = [path for place in ("base", "tasks/*") for path in root.glob(f"{place}/*.safetensors")]
    one_pass = sum(path.stat().st_size for path in weights)
    print(f"method   passes of single merges at {', '.join(SIZES)}   passes of --sizes")
    for method in methods:
        words = ("merge", root / "plan.json", "--method", method)
        single = [counted(*words, "--size", size, "-o", root / f"{method}-{size}")[1] for size in SIZES]
        together = counted(*words, "--sizes", ",".join(SIZES), "-o", root / method)[1]
        print(f"{method:8} {sum(single) / one_pass:41.2f}   {together / one_pass:17.2f}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), sys.argv[1:] or list(METHODS))
