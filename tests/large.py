"""`python -m tests.large`: time and peak anonymous memory of `plan` and `merge` for four models of 1.3e9 parameters.

Base and fine-tunes are bfloat16 files of 2.6 GB each, named and shaped like a decoder of 24 layers of width 2048. They
are sparse: each tensor begins with drawn values, in which the models differ, and is zeros behind them, so that they
take little disk and are read at the speed of memory. Each command is a process of its own, imports included; what it
holds is read from /proc while it runs. Writes bundles of up to twice 2.6 GB below --folder; exits 1 over the limit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

WIDTH, LAYERS, WORDS, NUM_TASKS = 2048, 24, 50257, 4
DRAWN_ELEMENTS = 1 << 14  # of each tensor
LIMIT_BYTES = 1_000_000_000
COMMANDS = {
    "plan": ("plan", "--base", "base", "--tasks", "tasks", "-o", "plan.json"),
    "merge average 1x": ("merge", "plan.json", "--method", "average", "--size", "1x", "-o", "bundle"),
    "merge ties 2x": ("merge", "plan.json", "--method", "ties", "--size", "2x", "-o", "bundle"),
    "merge auto 1x": ("merge", "plan.json", "--method", "auto", "--size", "1x", "-o", "bundle"),
}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        found |= {
            f"{prefix}mlp.up_proj.weight": (4 * WIDTH, WIDTH),
            f"{prefix}mlp.down_proj.weight": (WIDTH, 4 * WIDTH),
        }
        found |= {f"{prefix}{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found


def write_sparse(path: Path, seed: int, shapes: Mapping[str, tuple[int, ...]], drawn: int = DRAWN_ELEMENTS) -> None:
    """A safetensors file of which most blocks are holes. drawn: values at the beginning of each tensor."""
    import numpy as np

    draw, header, offset = np.random.default_rng(seed), {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + offset)
        for entry in header.values():
            low, high = entry["data_offsets"]
            values = draw.standard_normal(min(drawn, (high - low) // 2)).astype(np.float32)
            file.seek(start + low)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def measured(words: tuple[str, ...], folder: Path) -> dict[str, float]:
    """Seconds, seconds of CPU, and the most anonymous memory of one command. Raises CalledProcessError."""
    start, peak = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, "-m", "flexmerge_cli", *words, "-q", "--force"], cwd=folder)
    while True:
        pid, status, used = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        text = Path(f"/proc/{child.pid}/status").read_text()
        peak = max(peak, int(text.split("RssAnon:")[1].split()[0]) * 1024 if "RssAnon:" in text else 0)
        time.sleep(0.01)
    if status:
        raise subprocess.CalledProcessError(status, words)
    return {"seconds": time.perf_counter() - start, "cpu": used.ru_utime + used.ru_stime, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/flexmerge-large"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("only", nargs="*", choices=[[], *COMMANDS], help="these commands alone")
    arguments = parser.parse_args()
    for number in range(NUM_TASKS + 1):
        place = arguments.folder / ("base" if number == 0 else f"tasks/task{number}") / "model.safetensors"
        if not place.exists():
            write_sparse(place, number, shapes())
    model_bytes = place.stat().st_size
    print(f"{NUM_TASKS} models and their base, {model_bytes / 1e9:.2f} GB each, {arguments.threads} threads")
    failed = False
    for name, words in COMMANDS.items():
        if arguments.only and name not in arguments.only:
            continue
        found = measured((*words, "--threads", str(arguments.threads)), arguments.folder)
        rate = (NUM_TASKS + 1) * model_bytes / found["seconds"]
        failed |= found["peak_bytes"] > LIMIT_BYTES
        print(
            f"{name:17} {found['seconds']:6.1f} s  {found['cpu']:6.1f} s of CPU  {rate / 1e9:5.2f} GB/s of sources  "
            f"{found['peak_bytes'] / 1e6:5.0f} MB anonymous, limit {LIMIT_BYTES / 1e6:.0f} MB",
            flush=True,
        )
    shutil.rmtree(arguments.folder / "bundle", ignore_errors=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
