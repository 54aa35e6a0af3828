"""`python -m tests.bench plan|merge|serve|cost|verify|calibrate|all`: our time and memory, and a bare loop.

Eight synthetic fine-tunes of ViT-B/32 size (88 M parameters, float32), made once in --folder. The bare loop does the
least that comparing them can take: positional reads into reused buffers, one subtraction and one Gram product per
256 k-element chunk, two workers; `our-plan-gram` takes no more, `our-plan` what `auto` needs, too. For `merge` at 1x it
reads the input and writes the output once. `all` prints a table of them, of thirty bfloat16 fine-tunes and of reading a
task, each with its limit. `serve`, `cost` and `calibrate` are of bench_serve.py, bench_cost.py and
bench_calibrate.py. For `verify`, export and the first use of a view (every tensor is looked up, and copied) with the
comparison of digests beside without, of a dense and a coded bundle, also of files that are not in the page cache
(`cold`). Imports are apart: each part runs in a process of its own and tells the time from after its imports. Files are
read once before, so that all runs find them in the page cache. Numbers of shared machines are noisy: compare ratios of
one run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tests.bench_calibrate import bare_passes, calibrated, make_calibrated, told
from tests.bench_cost import cost
from tests.bench_limits import print_limits
from tests.bench_serve import served

NUM_TASKS = 8
CHUNK_ELEMENTS = 1 << 18
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["plan", "merge", "serve", "cost", "verify", "calibrate", "all", *PARTS])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flexmerge-bench"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--width", type=int, default=768, help="of the models: 384 has 22 M parameters")
    parser.add_argument("--device", default="cpu", help="of serve and cost")
    arguments = parser.parse_args()
    if arguments.what in PARTS:
        print(json.dumps(measured(PARTS[arguments.what], arguments.folder)))
        return
    if arguments.what in ("serve", "cost"):
        measure = served if arguments.what == "serve" else cost
        for what, figure in measure(arguments.folder / "serve", arguments.device):
            print(f"{what:50} {figure}", flush=True)
        return
    if arguments.what == "calibrate":
        folder = arguments.folder / "calibrate"
        make_calibrated(folder)
        found = {name: run_part(name, folder) for name in ("bare-calibrate", "our-inputs", "our-fisher")}
        for what, figure in told(found, folder):
            print(f"{what:50} {figure}", flush=True)
        return
    if arguments.width != 768:
        arguments.folder /= f"width-{arguments.width}"
    make_family(arguments.folder, width=arguments.width)
    if arguments.what == "all":
        make_family(arguments.folder / "thirty", width=arguments.width, tasks=30, dtype="bfloat16")
        sys.exit(not print_limits(run_part, arguments.folder, arguments.repeat))
    if arguments.what == "verify":
        compare_verified(arguments.folder, arguments.repeat)
        return
    if arguments.what == "merge":
        run_part("our-plan", arguments.folder)
    names = [f"bare-{arguments.what}", f"our-{arguments.what}"]
    names += ["our-plan-gram"] if arguments.what == "plan" else []
    best: dict[str, dict[str, float]] = {}
    for _ in range(arguments.repeat):
        for name in names:
            found = run_part(name, arguments.folder)
            seconds = f"{found['seconds']:6.2f} s  {found['cpu']:6.2f} s of CPU"
            print(f"{name:13} {seconds}  {found['peak_bytes'] / 1e6:6.0f} MB", flush=True)
            if name not in best or found["cpu"] < best[name]["cpu"]:
                best[name] = found
    bare = best[names[0]]
    for name in names[1:]:
        ours = best[name]
        print(f"{name} / bare, best of {arguments.repeat}: {ours['seconds'] / bare['seconds']:.2f}x time", end=", ")
        print(f"{ours['cpu'] / bare['cpu']:.2f}x CPU time", end=", ")
        print(f"peak anonymous memory {ours['peak_bytes'] / 1e6:.0f} MB (bare loop {bare['peak_bytes'] / 1e6:.0f} MB)")


def compare_verified(folder: Path, repeat: int) -> None:
    """Print medians of runs turn by turn, so that what else the machine does slows both alike."""
    if not (folder / "coded").exists():
        run_part("our-plan-gram", folder)
        run_part("our-bundles", folder)
    for what in ("export-dense", "export-coded", "view-dense", "view-coded", "cold-view-dense", "cold-view-coded"):
        pairs = [(run_part(what, folder), run_part(f"{what}-verified", folder)) for _ in range(repeat)]
        for unit in ("seconds", "cpu"):
            plain, verified = (statistics.median(run[unit] for run in runs) for runs in zip(*pairs, strict=True))
            print(f"{what:16} {unit:8} {plain:6.2f}, verified {verified:6.2f}: {verified / plain:.2f}x", flush=True)


def run_part(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench", name, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(part: Callable[[Path], Callable[[], None]], folder: Path) -> dict[str, float]:
    """Seconds of the part after its imports, and the peak of the process' anonymous memory."""
    run = part(folder)
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    return {"seconds": seconds, "cpu": time.process_time() - cpu, "peak_bytes": max(peak[0], anonymous_bytes())}


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


# Parts: each imports, and returns what is to be timed.


def bare_plan(folder: Path) -> Callable[[], None]:
    import numpy as np
    import torch

    torch.set_num_threads(1)
    files, items, dtype = open_all(folder)

    def run() -> None:
        local = threading.local()

        def work(item: tuple[int, int]) -> "np.ndarray":
            offset, count = item
            if not hasattr(local, "buffers"):
                local.buffers = np.empty((len(files), CHUNK_ELEMENTS * dtype.itemsize), np.uint8)
                local.floats = torch.empty(len(files), CHUNK_ELEMENTS)
            chunk = local.buffers[:, : count * dtype.itemsize]
            for row, file in enumerate(files):
                os.preadv(file, [chunk[row].data], offset)
            models = torch.from_numpy(chunk).view(dtype)
            if dtype is not torch.float32:
                models = local.floats[:, :count].copy_(models)
            deltas = models[1:].sub_(models[0])
            return (deltas @ deltas.T).numpy()

        with ThreadPoolExecutor(WORKERS) as pool:
            gram = sum(pool.map(work, items))
        assert np.isfinite(gram).all()

    return run


def bare_merge(folder: Path) -> Callable[[], None]:
    import numpy as np

    files, items, _ = open_all(folder)
    target = folder / "bare.out"
    target.unlink(missing_ok=True)
    out = os.open(target, os.O_RDWR | os.O_CREAT, 0o666)
    os.posix_fallocate(out, 0, os.fstat(files[0]).st_size)

    def run() -> None:
        local = threading.local()

        def work(item: tuple[int, int]) -> None:
            offset, count = item
            if not hasattr(local, "buffers"):
                local.buffers = np.empty((len(files), CHUNK_ELEMENTS), np.float32)
            chunk = local.buffers[:, :count]
            for row, file in enumerate(files):
                os.preadv(file, [chunk[row].data], offset)
            os.pwrite(out, chunk[0].data, offset)

        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(work, items))
        os.fsync(out)

    return run


def our_plan(folder: Path, statistics: str = "all") -> Callable[[], None]:
    import torch

    from flexmerge_cli import make_plan
    from flexmerge_cli.engine import survey

    torch.zeros(1), survey
    tasks = {path.name: path for path in sorted((folder / "tasks").iterdir())}
    return lambda: (
        make_plan(folder / "base", tasks, output=folder / "plan.json", device="cpu", statistics=statistics) and None
    )


def our_merge(folder: Path, method: str = "average", size: str | None = "1x") -> Callable[[], None]:
    from flexmerge_cli import merge
    from flexmerge_cli.bundle import write
    from flexmerge_cli.engine import memory
    from flexmerge_cli.methods.registry import all_methods

    assert write and memory and all_methods()  # each method is a module
    shutil.rmtree(folder / "bundle", ignore_errors=True)
    options = {"method": method, "size": size, "device": "cpu"}
    return lambda: merge(folder / "plan.json", folder / "bundle", **options) and None


def our_auto(folder: Path) -> Callable[[], None]:
    """What `auto` chooses from a plan that is read already."""
    from flexmerge_cli.allocation.allocate import allocate
    from flexmerge_cli.planning.make import load_plan
    from flexmerge_cli.request.merge import merge_request

    plan, request = load_plan(folder / "plan.json"), merge_request(method="auto", size="1x")
    return lambda: allocate(plan, request) and None


def bare_load(folder: Path) -> Callable[[], None]:
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    path = folder / "tasks" / "task1" / "model.safetensors"
    shutil.copyfile(path, os.devnull)
    return lambda: {name: value.clone() for name, value in load_file(path).items()} and None


def our_bundles(folder: Path) -> Callable[[], None]:
    from flexmerge_cli import merge

    def run() -> None:
        for name, method, size in (("dense", "average", "2x"), ("coded", "low_bit:bits=4", None)):
            shutil.rmtree(folder / name, ignore_errors=True)
            merge(folder / "plan.json", folder / name, method=method, size=size, device="cpu")

    return run


def our_export(folder: Path, bundle: str, *, verify: Literal["xxh3", "off"]) -> Callable[[], None]:
    from flexmerge_cli.bundle.export import export_task
    from flexmerge_cli.bundle.read import Bundle
    from flexmerge_cli.methods import coded

    assert coded
    target = folder / "exported"
    shutil.rmtree(target, ignore_errors=True)
    return lambda: export_task(Bundle.open(folder / bundle, tasks=["task1"], verify=verify), "task1", target)


def our_view(folder: Path, bundle: str, *, verify: Literal["xxh3", "off"], cold: bool = False) -> Callable[[], None]:
    import torch

    from flexmerge_cli.bundle.read import Bundle
    from flexmerge_cli.bundle.view import View
    from flexmerge_cli.methods import coded

    assert coded
    torch.set_num_threads(1)
    for file in (folder / bundle).rglob("*.safetensors"):
        if cold:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            shutil.copyfile(file, os.devnull)
    return lambda: (
        {name: value.clone() for name, value in View(Bundle.open(folder / bundle, verify=verify), "task1").items()}
        and None
    )


PARTS = {
    "bare-plan": bare_plan,
    "our-plan": our_plan,
    "our-plan-gram": lambda folder: our_plan(folder, "gram"),
    "bare-merge": bare_merge,
    "our-merge": our_merge,
    "our-merge-ties": partial(our_merge, method="ties"),
    "our-merge-emr": partial(our_merge, method="emr", size=None),
    "our-auto": our_auto,
    "our-bundles": our_bundles,
    "bare-load": bare_load,
    **{
        f"{what}-{bundle}{'' if verify == 'off' else '-verified'}": partial(part, bundle=bundle, verify=verify)
        for what, part in (("export", our_export), ("view", our_view), ("cold-view", partial(our_view, cold=True)))
        for bundle in ("dense", "coded")
        for verify in ("off", "xxh3")
    },
    "bare-calibrate": bare_passes,
    "our-inputs": partial(calibrated, statistics="inputs"),
    "our-fisher": partial(calibrated, statistics="fisher"),
}


def open_all(folder: Path) -> tuple[list[int], list[tuple[int, int]], Any]:
    """Descriptors of base and tasks, (byte, elements) of every chunk of every tensor, and the dtype of all."""
    import torch
    from safetensors import safe_open

    paths = [folder / "base", *sorted((folder / "tasks").iterdir())]
    files = [os.open(path / "model.safetensors", os.O_RDONLY) for path in paths]
    header = int.from_bytes(os.pread(files[0], 8, 0), "little")
    entries = json.loads(os.pread(files[0], header, 8))
    assert safe_open
    items = []
    for name, entry in entries.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[entry["dtype"]]
            count = (end - start) // dtype.itemsize
            for low in range(0, count, CHUNK_ELEMENTS):
                items.append((8 + header + start + dtype.itemsize * low, min(CHUNK_ELEMENTS, count - low)))
    return files, sorted(items), dtype


def make_family(
    folder: Path, *, width: int = 768, layers: int = 12, tasks: int = NUM_TASKS, dtype: str = "float32"
) -> None:
    """A base and fine-tunes with the names and, as they are, the shapes of CLIP's ViT-B/32 image tower."""
    import torch
    from safetensors.torch import save_file

    if (folder / "done").exists():
        for path in folder.rglob("model.safetensors"):
            shutil.copyfile(path, os.devnull)
        return
    shapes = {}
    shapes["vision_model.embeddings.class_embedding"] = [width]
    shapes["vision_model.embeddings.patch_embedding.weight"] = [width, 3, 32, 32]
    shapes["vision_model.embeddings.position_embedding.weight"] = [50, width]
    for layer in range(layers):
        prefix = f"vision_model.encoder.layers.{layer}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{prefix}{norm}.weight": [width], f"{prefix}{norm}.bias": [width]}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{prefix}self_attn.{name}.weight": [width, width], f"{prefix}self_attn.{name}.bias": [width]}
        shapes |= {f"{prefix}mlp.fc1.weight": [4 * width, width], f"{prefix}mlp.fc1.bias": [4 * width]}
        shapes |= {f"{prefix}mlp.fc2.weight": [width, 4 * width], f"{prefix}mlp.fc2.bias": [width]}
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"vision_model.{norm}.weight": [width], f"vision_model.{norm}.bias": [width]}
    shapes["visual_projection.weight"] = [512, width]
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    for index in range(tasks + 1):
        place = folder / "base" if index == 0 else folder / "tasks" / f"task{index}"
        place.mkdir(parents=True, exist_ok=True)
        tensors = base
        if index:
            tensors = {n: t + torch.randn(t.shape, generator=generator) * 0.001 for n, t in base.items()}
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    (folder / "done").touch()


if __name__ == "__main__":
    main()
