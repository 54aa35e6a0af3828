"""`python -m tests.bench serve [--device cuda]`: memory, throughput and loading of a runtime, beside plain models.

Three families of eight synthetic fine-tunes, made once in --folder: CLIP's ViT-B/32 image tower (88 M parameters), and
a Llama-shaped language model (110 M), in float32 and in bfloat16. Each is merged by average at 1x, 2.25x and 4x, and
packed by `auto` at 1x. Every figure comes from a process of its own. On the CPU times are processor times and memory is
PSS; on a GPU they are those of the clock and what torch has allocated there. Numbers of shared machines are noisy:
compare ratios of one run.
"""

import gc
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

NUM_TASKS = 8
SIZES = {
    "average-1x": ("average", "1x"),
    "average-2.25x": ("average", "2.25x"),
    "average-4x": ("average", "4x"),
    "auto-1x": ("auto", "1x"),
}


def clip() -> Any:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32,
        projection_dim=512,
    )  # fmt: skip
    return transformers.CLIPVisionModelWithProjection, config


def llama() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM, config


FAMILIES = {"vit": clip, "llama": llama, "llama-bf16": llama}


def make_family(root: Path, sizes: Collection[str]) -> None:
    """A base and its fine-tunes, their plan, and a bundle of every size."""
    import torch

    from flexmerge_cli import make_plan, merge

    if not (root / "plan.json").exists():
        kind, config = FAMILIES[root.name]()
        torch.manual_seed(0)
        model = kind(config).to(torch.bfloat16 if root.name.endswith("bf16") else torch.float32)
        model.save_pretrained(root / "base")
        base = {key: value.clone() for key, value in model.state_dict().items()}
        for number in range(NUM_TASKS):
            generator = torch.Generator().manual_seed(number + 1)
            with torch.no_grad():
                for key, value in model.named_parameters():
                    value.copy_(base[key].float() + 0.001 * torch.randn(value.shape, generator=generator))
            model.save_pretrained(root / "tasks" / f"task{number}", max_shard_size="10GB")
        tasks = {path.name: path for path in (root / "tasks").iterdir()}
        make_plan(root / "base", tasks, output=root / "plan.json", device="cpu")
    for bundle in sizes:
        method, size = SIZES[bundle]
        if not (root / bundle).exists():
            merge(root / "plan.json", root / bundle, method=method, size=size, device="cpu")
    for path in root.rglob("*.safetensors"):
        shutil.copyfile(path, "/dev/null")  # all runs then find it in the page cache


# Figures: each runs in a process of its own and prints one JSON value.


def resident(bundle: Path, weights: str, device: str) -> dict[str, float]:
    """Memory of all tasks after one forward each, beyond the process with its imports; and the peak while they load."""
    import transformers

    from flexmerge_cli import open_bundle

    assert transformers.CLIPVisionModelWithProjection and transformers.LlamaForCausalLM
    plain_forward(bundle, device)
    gc.collect()
    before = held_bytes(device)
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], held_bytes(device))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    runtime = open_bundle(bundle, verify="off").runtime(weights=weights, device=device)
    for task in runtime.tasks:
        model = runtime.model(task)
        with torch_inference():
            model(**inputs_of(bundle, 1, device))
    gc.collect()
    found = held_bytes(device) - before
    stop.set()
    watcher.join()
    told = sum(runtime.num_bytes.values())
    stored = sum(part.num_bytes for parts in runtime._bundle.parts.values() for part in parts.values())
    return {"found": found, "told": told, "stored": stored, "peak": peak[0] - before}


def throughput(bundle: Path, weights: str, device: str) -> dict[str, float]:
    """Seconds of 32 examples: of one task, of eight tasks in one batch, and of the plain model, turn by turn."""
    from flexmerge_cli import open_bundle

    opened = open_bundle(bundle, verify="off")
    runtime = opened.runtime(weights=weights, device=device)
    plain, inputs = plain_model(bundle, device), inputs_of(bundle, 32, device)
    tasks = [task for task in runtime.tasks for _ in range(32 // len(runtime.tasks))]
    one = runtime.model(runtime.tasks[0])
    with torch_inference():
        return best_of(
            {
                "plain": lambda: plain(**inputs),
                "one": lambda: one(**inputs),
                "eight": lambda: runtime(inputs, tasks),
            },
            device,
        )


def tokens(bundle: Path, weights: str, device: str) -> dict[str, float]:
    """Seconds of 16 generated tokens after a prompt of 16: plain, one task, and eight tasks at once, one row each."""
    from flexmerge_cli import open_bundle

    runtime = open_bundle(bundle, verify="off").runtime(weights=weights, device=device)
    plain, one = plain_model(bundle, device), runtime.model(runtime.tasks[0])
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    single, eight = inputs_of(bundle, 1, device), inputs_of(bundle, len(runtime.tasks), device)
    with torch_inference():
        return best_of(
            {
                "plain": lambda: plain.generate(**single, **options),
                "one": lambda: one.generate(**single, **options),
                "eight": lambda: runtime.generate(eight, list(runtime.tasks), **options),
            },
            device,
        )


def first_answer(bundle: Path, weights: str, device: str) -> dict[str, float]:
    """Seconds from an open bundle to a task's first output; and those of load_file, a copy and one forward."""
    from safetensors.torch import load_file

    from flexmerge_cli import open_bundle

    opened, plain = open_bundle(bundle, verify="off"), plain_model(bundle, device)
    inputs, path = inputs_of(bundle, 1, device), bundle.parent / "tasks" / "task1" / "model.safetensors"

    def answer() -> None:
        opened.runtime(weights=weights, device=device, tasks=["task1"]).model("task1")(**inputs)

    with torch_inference():
        return best_of(
            {
                "load": lambda: {name: value.to(device, copy=True) for name, value in load_file(path).items()},
                "forward": lambda: plain(**inputs),
                "answer": answer,
            },
            device,
        )


def best_of(runs: dict[str, Callable[[], object]], device: str, repeat: int = 3) -> dict[str, float]:
    """Measure all in turn, and return the least seconds of each. The first turn warms up.

    On the CPU these are seconds of processor time: with one thread that is what it takes where nothing else runs.
    `spread` is the largest part by which a median is above its least: where it is large, the machine was busy.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name, run in runs.items():
            start = seconds(device)
            run()
            if turn:
                found[name].append(seconds(device) - start)
    least = {name: min(taken) for name, taken in found.items()}
    return least | {"spread": max(median(taken) / least[name] - 1 for name, taken in found.items())}


def seconds(device: str) -> float:
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def spread(found: dict[str, float]) -> str:
    return f"spread {100 * found['spread']:.0f} %"


def torch_inference() -> Any:
    import torch

    return torch.inference_mode()


def plain_model(bundle: Path, device: str) -> Any:
    kind, _ = FAMILIES[bundle.parent.name]()
    return kind.from_pretrained(bundle.parent / "tasks" / "task1", dtype="auto").eval().to(device)


def plain_forward(bundle: Path, device: str) -> None:
    """So that what torch sets up at its first products is there before memory is measured."""
    kind, config = FAMILIES[bundle.parent.name]()
    with torch_inference():
        kind(config).eval().to(device)(**inputs_of(bundle, 1, device))


def inputs_of(bundle: Path, count: int, device: str = "cpu") -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    if bundle.parent.name != "vit":
        ids = torch.randint(3, 32000, (count, 16), generator=generator).to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"pixel_values": torch.randn(count, 3, 224, 224, generator=generator).to(device)}


def held_bytes(device: str) -> int:
    """Measure the PSS of the process on the CPU, and on a GPU what torch has allocated there."""
    import torch

    return pss_bytes() if device == "cpu" else torch.cuda.memory_allocated()


def pss_bytes() -> int:
    return int(Path("/proc/self/smaps_rollup").read_text().split("\nPss:")[1].split()[0]) * 1024


FIGURES: dict[str, Callable[[Path, str, str], dict[str, float]]] = {
    "resident": resident,
    "throughput": throughput,
    "tokens": tokens,
    "first_answer": first_answer,
}


def run_figure(figure: str, bundle: Path, weights: str, device: str) -> dict[str, float]:
    module = FIGURES[figure].__module__
    command = [sys.executable, "-m", module, figure, str(bundle), weights, device]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_figure() -> None:
    """What `run_figure` runs."""
    import torch

    torch.set_num_threads(1)
    print(json.dumps(FIGURES[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])))


def served(
    folder: Path, device: str, sizes: Collection[str] = tuple(SIZES), families: Collection[str] = tuple(FAMILIES)
) -> Iterator[tuple[str, str]]:
    """What was measured, and the figure: the table of docs/serving.md."""
    for family in families:
        make_family(folder / family, sizes)
        for name in sizes:
            bundle, weights = (
                folder / family / name,
                "packed" if name.startswith("auto") else "dense",
            )
            who, figure = (
                f"{family} {name} {weights}",
                partial(run_figure, bundle=bundle, weights=weights, device=device),
            )
            memory = figure("resident")
            limit = 1.1 * memory["stored"] + 60e6
            megabytes = {key: f"{value / 1e6:.0f}" for key, value in memory.items()}
            told = f"told {megabytes['told']}, peak {megabytes['peak']}"
            yield f"{who}: MB resident", f"{megabytes['found']} (limit {limit / 1e6:.0f}), {told}"
            if family == "vit":
                found = figure("throughput")
                one, eight = found["plain"] / found["one"], found["plain"] / found["eight"]
                yield f"{who}: batch of 32 of one task", f"{one:.2f} of plain ({found['plain']:.3f} s), {spread(found)}"
                yield f"{who}: 8 tasks x 4 examples", f"{eight:.2f} of plain"
            else:
                found = figure("tokens")
                yield (
                    f"{who}: tokens/s at batch 1",
                    f"{16 / found['one']:.1f}, {found['plain'] / found['one']:.2f} of plain, {spread(found)}",
                )
                yield f"{who}: 8 tasks x 1 row", f"{8 * 16 / found['eight']:.1f} tokens/s"
            found = figure("first_answer")
            ratio = found["answer"] / (1.3 * found["load"] + found["forward"])
            yield (
                f"{who}: first answer",
                f"{found['answer']:.2f} s, {ratio:.2f} of 1.3 x load_file + forward, {spread(found)}",
            )


if __name__ == "__main__":
    print_figure()
