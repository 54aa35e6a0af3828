"""`python -m tests.scale_table PLAN MERGE`: the table of docs/scale.md, from seconds of CPU a GB of sources.

PLAN and MERGE are what `python -m tests.large` measures. The families are sparse files with the shapes of Llama 2 whose
headers alone are read: memory is what `--dry-run` tells of it. Minutes are those of the slower of two: the disks, which
read every model once and write the bundle, and the processors.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.engine.memory import survey_bytes
from flexmerge_cli.engine.merge_memory import merge_bytes
from flexmerge_cli.planning.make import divided, provisional_plan, survey_items
from flexmerge_cli.planning.sources import open_family
from flexmerge_cli.request.merge import merge_request
from flexmerge_cli.request.plan import PlanRequest
from tests.large import write_sparse

WORKERS, CORES = 16, 8
WORDS = 32000
# what -> tasks, width, of keys and values, of the MLP, layers
FAMILIES = {
    "8 × 7 B": (8, 4096, 4096, 11008, 32),
    "30 × 14 GB": (30, 4096, 4096, 11008, 32),
    "64 × 140 GB": (64, 8192, 1024, 28672, 80),
}


def shapes(width: int, keys: int, inner: int, layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, width), "lm_head.weight": (WORDS, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        found |= {f"{prefix}self_attn.{name}_proj.weight": (keys, width) for name in "kv"}
        found |= {f"{prefix}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found |= {f"{prefix}mlp.down_proj.weight": (width, inner)}
        found |= {f"{prefix}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found


def row(root: Path, what: str, cpu: dict[str, float]) -> str:
    num_tasks, *form = FAMILIES[what]
    for number in range(num_tasks + 1):
        write_sparse(root / f"{number}" / "model.safetensors", number, shapes(*form), drawn=0)
    tasks = {f"task{number}": str(root / f"{number}") for number in range(1, num_tasks + 1)}
    request = PlanRequest(base=str(root / "0"), tasks=tasks)
    family = open_family(request)
    _, items = survey_items(divided(family, request), request)
    plan = provisional_plan(family, request)
    layout = allocate(plan, merge_request(method="average", size="1x"))
    memory = survey_bytes(items, CORES), merge_bytes(layout, CORES)
    read = (num_tasks + 1) * plan.one_model_bytes
    cells = [what, *(f"{count / 1e9:,.0f} GB" for count in (read, plan.one_model_bytes))]
    cells += [f"{found / 1e9:.1f} GB" for found in memory]
    for verb, written in (("plan", 0), ("merge", plan.one_model_bytes)):
        for rate in (1e9, 10e9):
            seconds = max((read + written) / rate, cpu[verb] * read / 1e9 / (WORKERS * CORES))
            cells.append(f"{seconds / 60:,.1f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    cpu = dict(zip(("plan", "merge"), map(float, sys.argv[1:3]), strict=True))
    heads = "models", "read", "written", "memory, plan", "merge", "plan, 1 GB/s", "10 GB/s", "merge, 1 GB/s", "10 GB/s"
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for what in FAMILIES:
        root = Path(tempfile.mkdtemp(prefix="flexmerge-scale-"))
        try:
            print(row(root, what, cpu), flush=True)
        finally:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
