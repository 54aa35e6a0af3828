"""`python -m tests.bench serve`: memory, throughput and loading of a runtime, beside plain transformers models.

Two families of eight synthetic fine-tunes, made once in --folder: CLIP's ViT-B/32 image tower (88 M parameters), and a
Llama-shaped language model (110 M). Each is merged by average at 1x, 2.25x and 4x, and packed by `auto` at 1x. Every
figure comes from a process of its own. Numbers of shared machines are noisy: compare ratios of one run.
"""

import gc
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
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


FAMILIES = {"vit": clip, "llama": llama}


def make_families(folder: Path) -> None:
    """A base and its fine-tunes, their plan, and a bundle of every size."""
    import torch

    from flexmerge_cli import make_plan, merge

    for name, form in FAMILIES.items():
        root = folder / name
        if not (root / "plan.json").exists():
            kind, config = form()
            torch.manual_seed(0)
            model = kind(config)
            model.save_pretrained(root / "base")
            base = {key: value.clone() for key, value in model.state_dict().items()}
            for number in range(NUM_TASKS):
                generator = torch.Generator().manual_seed(number + 1)
                with torch.no_grad():
                    for key, value in model.named_parameters():
                        value.copy_(base[key] + 0.001 * torch.randn(value.shape, generator=generator))
                model.save_pretrained(root / "tasks" / f"task{number}", max_shard_size="10GB")
            tasks = {path.name: path for path in (root / "tasks").iterdir()}
            make_plan(root / "base", tasks, output=root / "plan.json", device="cpu")
        for bundle, (method, size) in SIZES.items():
            if not (root / bundle).exists():
                merge(root / "plan.json", root / bundle, method=method, size=size, device="cpu")
        for path in root.rglob("*.safetensors"):
            shutil.copyfile(path, "/dev/null")  # all runs then find it in the page cache


# Figures: each runs in a process of its own and prints one JSON value.


def resident(bundle: Path, weights: str) -> dict[str, float]:
    """PSS of all tasks after one forward each, beyond the process with its imports; and the peak while they load."""
    import transformers

    from flexmerge_cli import open_bundle

    assert transformers.CLIPVisionModelWithProjection and transformers.LlamaForCausalLM
    plain_forward(bundle)
    gc.collect()
    before = pss_bytes()
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], pss_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    runtime = open_bundle(bundle, verify="off").runtime(weights=weights)
    for task in runtime.tasks:
        model = runtime.model(task)
        with torch_inference():
            model(**small_inputs(bundle))
    gc.collect()
    found = pss_bytes() - before
    stop.set()
    watcher.join()
    told = sum(runtime.num_bytes.values())
    stored = sum(part.num_bytes for parts in runtime._bundle.parts.values() for part in parts.values())
    return {"found": found, "told": told, "stored": stored, "peak": peak[0] - before}


def throughput(bundle: Path, weights: str) -> dict[str, float]:
    """Seconds of 32 examples: of one task, of eight tasks in one batch, and of the plain model, turn by turn."""
    from flexmerge_cli import open_bundle

    opened = open_bundle(bundle, verify="off")
    runtime = opened.runtime(weights=weights)
    plain, inputs = plain_model(bundle), inputs_of(bundle, 32)
    tasks = [task for task in runtime.tasks for _ in range(32 // len(runtime.tasks))]
    one = runtime.model(runtime.tasks[0])
    with torch_inference():
        return best_of(
            {
                "plain": lambda: plain(**inputs),
                "one": lambda: one(**inputs),
                "eight": lambda: runtime(inputs, tasks),
            }
        )


def tokens(bundle: Path, weights: str) -> dict[str, float]:
    """Seconds of 16 generated tokens after a prompt of 16: plain, one task, and eight tasks at once, one row each."""
    from flexmerge_cli import open_bundle

    runtime = open_bundle(bundle, verify="off").runtime(weights=weights)
    plain, one = plain_model(bundle), runtime.model(runtime.tasks[0])
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    single, eight = inputs_of(bundle, 1), inputs_of(bundle, len(runtime.tasks))
    with torch_inference():
        return best_of(
            {
                "plain": lambda: plain.generate(**single, **options),
                "one": lambda: one.generate(**single, **options),
                "eight": lambda: runtime.generate(eight, list(runtime.tasks), **options),
            }
        )


def first_answer(bundle: Path, weights: str) -> dict[str, float]:
    """Seconds from an open bundle to a task's first output; and those of load_file, a copy and one forward."""
    from safetensors.torch import load_file

    from flexmerge_cli import open_bundle

    opened, plain = open_bundle(bundle, verify="off"), plain_model(bundle)
    inputs, path = inputs_of(bundle, 1), bundle.parent / "tasks" / "task1" / "model.safetensors"

    def answer() -> None:
        opened.runtime(weights=weights, tasks=["task1"]).model("task1")(**inputs)

    with torch_inference():
        return best_of(
            {
                "load": lambda: {name: value.clone() for name, value in load_file(path).items()},
                "forward": lambda: plain(**inputs),
                "answer": answer,
            },
            repeat=3,
        )


def best_of(runs: dict[str, Callable[[], object]], repeat: int = 2) -> dict[str, float]:
    """Least seconds of processor time of each, turn by turn; with one thread that is what it takes where nothing else
    runs. The first turn warms up."""
    found = dict.fromkeys(runs, float("inf"))
    for turn in range(repeat + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:
                found[name] = min(found[name], time.process_time() - start)
    return found


def torch_inference() -> Any:
    import torch

    return torch.inference_mode()


def plain_model(bundle: Path) -> Any:
    return FAMILIES[bundle.parent.name]()[0].from_pretrained(bundle.parent / "tasks" / "task1").eval()


def plain_forward(bundle: Path) -> None:
    """So that what torch sets up at its first products is there before memory is measured."""
    kind, config = FAMILIES[bundle.parent.name]()
    with torch_inference():
        kind(config).eval()(**small_inputs(bundle))


def small_inputs(bundle: Path) -> dict[str, Any]:
    return inputs_of(bundle, 1)


def inputs_of(bundle: Path, count: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    if bundle.parent.name == "llama":
        ids = torch.randint(3, 32000, (count, 16), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"pixel_values": torch.randn(count, 3, 224, 224, generator=generator)}


def pss_bytes() -> int:
    return int(Path("/proc/self/smaps_rollup").read_text().split("\nPss:")[1].split()[0]) * 1024


FIGURES = {"resident": resident, "throughput": throughput, "tokens": tokens, "first_answer": first_answer}


def run_figure(figure: str, bundle: Path, weights: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench_serve", figure, str(bundle), weights]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare_served(folder: Path) -> None:
    """The table of docs/serving.md."""
    make_families(folder)
    for family in FAMILIES:
        for name in SIZES:
            bundle, weights = folder / family / name, "packed" if name.startswith("auto") else "dense"
            show = partial(print, f"{family:6}{name:14}{weights:7}", flush=True)
            memory = run_figure("resident", bundle, weights)
            limit = 1.1 * memory["stored"] + 60e6
            sizes = {key: f"{value / 1e6:.0f}" for key, value in memory.items()}
            show(f"MB resident {sizes['found']} (limit {limit / 1e6:.0f}), told {sizes['told']}, peak {sizes['peak']}")
            if family == "vit":
                found = run_figure("throughput", bundle, weights)
                show(f"batch of 32 of one task: {found['plain'] / found['one']:.2f} of plain ({found['plain']:.2f} s)")
                show(f"8 tasks x 4 examples: {found['plain'] / found['eight']:.2f} of plain")
            else:
                found = run_figure("tokens", bundle, weights)
                show(f"tokens/s at batch 1: {16 / found['one']:.1f}, {found['plain'] / found['one']:.2f} of plain")
                show(f"8 tasks x 1 row: {8 * 16 / found['eight']:.1f} tokens/s")
            found = run_figure("first_answer", bundle, weights)
            ratio = found["answer"] / (1.3 * found["load"] + found["forward"])
            show(f"first answer: {found['answer']:.2f} s, {ratio:.2f} of 1.3 x load_file + forward")


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    print(json.dumps(FIGURES[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])))
