"""`python -m tests.bench_gpu --device cuda`: results and times on a device beside the CPU's, in one table.

For `tests/gpu.sh`. Eight synthetic fine-tunes of ViT-B/32 size, made in --folder. Whatever must agree with the CPU is
compared; a row that does not ends with `DIFFERS`, and so does the command, with exit code 1. Bandwidth is what a task's
tensors take from the page cache to the device, beside plain copies of the same tensors out of memory.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmerge_cli import make_plan, merge, open_bundle
from flexmerge_cli.api import OpenBundle
from tests.bench import make_family
from tests.bench_serve import served
from tests.methods.driver import Family
from tests.methods.driver import merge as merge_plainly
from tests.methods.test_every_method import flat, small_family
from tests.methods.variants import CALLS

METHODS = ["average", "ties", "emr", "consensus", "low_bit:bits=4", "sparse", "tsv_m"]
# Sums of products are taken in another order there: what is made of singular vectors differs in its last bits.
ORDERED = {"tsv_m"}
TOLERANCE = 2e-6

Row = tuple[str, str]


def rows(device: str, folder: Path, *, width: int = 768, layers: int = 12) -> Iterator[Row]:
    """All but what is served."""
    make_family(folder, width=width, layers=layers)
    yield from methods(device)
    yield from commands(device, folder)
    yield from views(device, folder)


def loads(device: str, folder: Path) -> Iterator[Row]:
    """Loading all tasks of a bundle of `bench_serve`, beside copies of the same parameters out of pinned memory.

    The skeletons are built before, and files are in the page cache.
    """
    for path in sorted(path.parent for path in folder.glob("*/average-1x/manifest.json")):
        seconds, tensors = [], {}
        for _ in range(3):
            runtime = open_bundle(path, verify="off").runtime(device=device)
            gigabytes = sum(runtime.num_bytes.values()) / 1e9  # builds them
            seconds.append(timed(device, lambda: [runtime.model(task) for task in runtime.tasks]))  # noqa: B023
            models = [runtime.model(task) for task in runtime.tasks]
            tensors = {held.data_ptr(): held for model in models for held in model.state_dict().values()}
        here = [held.cpu() for held in tensors.values()]
        here = [held.pin_memory() for held in here] if device.startswith("cuda") else here
        rate, most = gigabytes / min(seconds), gigabytes / best(device, partial(copied, here, device))
        yield (
            f"loading {path.parent.name} {path.name}",
            f"{rate:.1f} GB/s, {rate / most:.2f} of copies out of pinned memory ({most:.1f} GB/s)",
        )


def methods(device: str) -> Iterator[Row]:
    """Every method with every word that it takes, on a family with ties, cancellations and zeros."""
    family, worst, where = small_family(), 0.0, ""
    there = Family(tasks=family.tasks, blocks=family.blocks, deltas={k: v.to(device) for k, v in family.deltas.items()})
    for name, call in CALLS.items():
        expected = flat(merge_plainly(family, call, bypass=False), family.tasks)
        found = flat(merge_plainly(there, call, bypass=False), family.tasks).cpu()
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= worst:  # also if it is no number
            worst, where = difference, f", of {name}"
    yield f"{len(CALLS)} methods: largest difference", said(f"{worst:.1e}{where}", worst <= TOLERANCE)


def commands(device: str, folder: Path) -> Iterator[Row]:
    """`plan` and `merge`, turn by turn with the CPU."""
    tasks = {path.name: path for path in sorted((folder / "tasks").iterdir())}
    plans, taken = {}, {}
    for where in ("cpu", device):
        path = folder / f"plan-{where.replace(':', '-')}.json"
        taken[where] = timed(where, partial(make_plan, folder / "base", tasks, output=path, device=where))
        plans[where] = json.loads(path.read_text())
    largest = difference(plans["cpu"]["tensors"], plans[device]["tensors"])
    yield "plan", f"{taken[device]:.2f} s, on the CPU {taken['cpu']:.2f} s"
    yield "plan: largest difference of a measurement", said(f"{largest:.1e}", largest <= TOLERANCE)
    for method in METHODS:
        found = {}
        for where in ("cpu", device):
            path = folder / f"{method}-{'cpu' if where == 'cpu' else 'device'}"
            run = partial(merge, folder / "plan-cpu.json", path, method=method, device=where, force=True)
            taken[where] = timed(where, run)
            found[where] = {file.relative_to(path): file for file in sorted((path / "weights").rglob("*.safetensors"))}
        same = found["cpu"].keys() == found[device].keys() and all(
            file.read_bytes() == found[device][name].read_bytes() for name, file in found["cpu"].items()
        )
        bits = "the same bytes" if same else "other bytes"
        yield (
            f"merge {method}",
            said(f"{taken[device]:.2f} s, on the CPU {taken['cpu']:.2f} s, {bits}", same or method in ORDERED),
        )


def views(device: str, folder: Path) -> Iterator[Row]:
    for method in ("average", "low_bit:bits=4", "emr"):
        bundle = open_bundle(folder / f"{method}-cpu")
        task = bundle.tasks[0]
        here = {name: value.clone() for name, value in bundle.view(task).items()}
        there = dict(bundle.view(task, device=device))
        same = all(torch.equal(there[name].cpu(), value) for name, value in here.items())
        gigabytes = sum(value.nbytes for value in here.values()) / 1e9
        copies = gigabytes / best(device, partial(copied, list(here.values()), device))
        rate = gigabytes / best(device, partial(looked_up, bundle, task, device))
        figure = f"{rate:.1f} GB/s, {rate / copies:.2f} of copies ({copies:.1f} GB/s)"
        if device.startswith("cuda"):
            pinned = [value.pin_memory() for value in here.values()]
            most = gigabytes / best(device, partial(copied, pinned, device))
            figure += f", {rate / most:.2f} of those out of pinned memory ({most:.1f} GB/s)"
        yield f"view {method}", said(figure, same)


def copied(values: list[Tensor], device: str) -> list[Tensor]:
    return [value.to(device, copy=True, non_blocking=True) for value in values]


def looked_up(bundle: OpenBundle, task: str, device: str) -> list[Tensor]:
    return list(bundle.view(task, device=device).values())


def said(figure: str, agrees: bool) -> str:
    return figure if agrees else f"{figure} DIFFERS"


def difference(left: Any, right: Any) -> float:
    """The largest of the numbers of two documents, relative to the larger one; infinite where anything else differs."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return max((difference(left[key], right[key]) for key in left), default=0.0)
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return max(map(difference, left, right), default=0.0)
    if isinstance(left, float) and isinstance(right, float):
        return abs(left - right) / max(abs(left), abs(right), 1e-30)
    return 0.0 if left == right else float("inf")


def timed(device: str, run: Callable[[], object]) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def best(device: str, run: Callable[[], object], repeat: int = 3) -> float:
    return min(timed(device, run) for _ in range(repeat))


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flexmerge-bench"))
    arguments = parser.parse_args()
    start, failed = time.perf_counter(), False
    all_rows = (
        rows(arguments.device, arguments.folder),
        served(arguments.folder / "serve", arguments.device, ["average-1x", "auto-1x"], ["vit", "llama"]),
        loads(arguments.device, arguments.folder / "serve"),
    )
    for of_part in all_rows:
        for what, figure in of_part:
            failed |= figure.endswith("DIFFERS")
            print(f"| {what:48} | {figure} |", flush=True)
    print(f"{time.perf_counter() - start:.0f} s")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
