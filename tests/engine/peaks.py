"""How much anonymous memory runs really take: each in a forked child, by the kernel's own high-water mark.

`python -m tests.engine.peaks FOLDER` reads cases, a JSON list, and writes what was found, another. In a process of its
own, so that the children begin with little memory that was freed and can be had again: it would not be counted.
"""

import ctypes
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

SHAPES = {
    "many": {f"layers.{i}.mlp.weight": (96, 128) for i in range(24)}
    | {f"layers.{i}.mlp.bias": (96,) for i in range(24)},
    "wide": {f"layers.{i}.mlp.weight": (1024, 1024) for i in range(4)},
    "few": {f"layers.{i}.mlp.weight": (640, 512) for i in range(3)},
    "embedding": {"embeddings.weight": (24000, 48), "layers.0.mlp.weight": (64, 48)},
    "long": {"embeddings.weight": (12000, 500)},
    "conv": {"layers.0.conv.weight": (128, 96, 5, 5), "layers.1.conv.weight": (96, 128, 3, 3)},
    "thin": {"layers.0.mlp.weight": (1, 300000), "layers.1.mlp.weight": (300000, 1), "layers.2.mlp.bias": (250000,)},
}
"""Families: tensors of the base by name."""
RANK = 16
"""The rank of adapters."""


def measured(cases: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Each case run in another process. {family, tasks, dtype, method, steps, …} -> the same with `peak`, `told`.

    A case: `family` of SHAPES, `tasks`, `dtype`; of `merge` `method`, `steps`, `calibrate`, `size`; `threads`; `chunk`:
    `smallest` or `default`. Or `sign_runs`, elements of a run, and `shape`: a matrix that is encoded. Found: `peak`,
    bytes of anonymous memory beyond the start's; `told`, those that are told.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.peaks", str(folder)],
        input=json.dumps(list(cases)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_child(prepare: Callable[[], tuple[int, Callable[[], object]]]) -> tuple[int, int]:
    """(what `prepare` tells, bytes of anonymous memory that its run takes beyond what is there before)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            told, run = prepare()
            ctypes.CDLL(None).malloc_trim(0)
            start = _status("RssAnon")
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
            run()
            taken = _status("VmHWM") - _status("RssFile") - _status("RssShmem") - start
            os.write(write, f"{told} {taken}".encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    assert os.waitpid(pid, 0)[1] == 0, "the run failed"
    told, taken = said.split()
    return int(told), int(taken)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def make_family(folder: Path, family: str, num_tasks: int, dtype: str = "float32", kind: str = "") -> Path:
    """Its plan, made once.

    kind: `mixed`, tasks in bfloat16; `rows`, every task with as many rows more as its number; `kept` or `pool`, tasks
    that are LoRA adapters, and one that is not where they are kept.
    """
    import torch
    from safetensors.torch import save_file

    from ..program import succeeds

    root = folder / f"{family}-{num_tasks}-{dtype}-{kind}"
    plan = root / "plan.json"
    if plan.exists():
        return plan
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES[family].items()}
    for number, name in enumerate(("base", *(f"tasks/task{number}" for number in range(num_tasks)))):
        stored = getattr(torch, "bfloat16" if kind == "mixed" and number else dtype)
        (root / name).mkdir(parents=True)
        if number and (kind == "pool" or (kind == "kept" and number > 1)):
            _save_adapter(root / name, base, draw)
            continue
        state = {
            key: value + 0.02 * torch.randn(value.shape, generator=draw) * (number > 0) for key, value in base.items()
        }
        if kind == "rows":
            state = {
                key: torch.cat([value, torch.randn(number, *value.shape[1:], generator=draw)])
                if "embed" in key
                else value
                for key, value in state.items()
            }
        save_file({key: value.to(stored) for key, value in state.items()}, root / name / "model.safetensors")
    adapters = ("--adapters", "pool" if kind == "pool" else "keep", "--assume-base")
    succeeds("plan", "--base", root / "base", "--tasks", root / "tasks", *adapters, "-o", plan, "-q")
    return plan


def _save_adapter(folder: Path, base: dict[str, Any], draw: Any) -> None:
    import torch
    from safetensors.torch import save_file

    modules = {key.removesuffix(".weight"): value.shape for key, value in base.items() if value.dim() == 2}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))
    state = {}
    for module, (rows, columns) in modules.items():
        state[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw)
        state[f"base_model.model.{module}.lora_B.weight"] = 0.02 * torch.randn(rows, RANK, generator=draw)
    save_file(state, folder / "adapter_model.safetensors")


def merging(case: dict[str, Any], plan_file: Path, output: Path) -> tuple[int, Callable[[], object]]:
    """(bytes that are told, the run) of one case of `merge`."""
    from flexmerge_cli import load_plan
    from flexmerge_cli.allocation.allocate import allocate
    from flexmerge_cli.checkpoint.access import Access
    from flexmerge_cli.engine.merge_memory import SMALLEST_CHUNK, merge_bytes
    from flexmerge_cli.engine.spans import CHUNK_ELEMENTS
    from flexmerge_cli.merging import merge
    from flexmerge_cli.planning.sources import open_sources
    from flexmerge_cli.request.merge import merge_request

    plan = load_plan(plan_file)
    size = case.get("size")
    request = merge_request(
        method=case["method"],
        cluster=case.get("cluster"),
        steps=tuple(case.get("steps", ())),
        calibrate=case.get("calibrate"),
        dtype=case.get("cast"),
        size=size,
        merges=None if size or case.get("cluster") else len(plan.order),
    )
    layout = allocate(plan, request)
    chunk, threads = {"smallest": SMALLEST_CHUNK, "default": CHUNK_ELEMENTS}[case["chunk"]], case.get("threads", 1)
    sources = open_sources(plan, plan_file.parent, {}, Access())
    told = merge_bytes(layout, threads, chunk, sources.located)

    def run() -> None:
        memory = told if case["chunk"] == "smallest" else None
        merge(
            plan, request, output, plan_folder=plan_file.parent, device="cpu", threads=threads, max_memory=memory,
            layout=layout,
        )  # fmt: skip

    return told, run


def planning(case: dict[str, Any], plan_file: Path, _output: Path) -> tuple[int, Callable[[], object]]:
    """The same of one case of `plan`."""
    from flexmerge_cli.engine.memory import survey_bytes
    from flexmerge_cli.engine.survey_item import CHUNK_ELEMENTS, PRODUCT_ELEMENTS
    from flexmerge_cli.family.vocabulary import split_vocabularies
    from flexmerge_cli.order.similarity import Similarity
    from flexmerge_cli.planning import kept_adapters
    from flexmerge_cli.planning.make import make_plan, survey_items
    from flexmerge_cli.planning.sources import open_family
    from flexmerge_cli.request.plan import OrderSettings, PlanRequest

    root, threads = plan_file.parent, case.get("threads", 1)
    tasks = {f"task{number}": str(root / f"tasks/task{number}") for number in range(case["tasks"])}
    order = OrderSettings(similarity=Similarity(case.get("similarity", "cosine")))
    adapters = "pool" if case.get("kind") == "pool" else "keep"
    request = PlanRequest(
        base=str(root / "base"), tasks=tasks, statistics=case["statistics"], order=order, adapters=adapters,
        assume_base=True,
    )  # fmt: skip
    opened = split_vocabularies(open_family(request))
    _, items = survey_items(opened, replace(request, statistics="gram") if adapters == "pool" else request)
    items += kept_adapters.base_items(opened) + kept_adapters.change_items(opened)
    chunk = {"smallest": PRODUCT_ELEMENTS, "default": CHUNK_ELEMENTS}[case["chunk"]]
    told = survey_bytes(items, threads, chunk, signs=order.similarity is Similarity.SIGN)
    limit = told if case["chunk"] == "smallest" else None
    return told, lambda: make_plan(request, device="cpu", threads=threads, max_memory=limit)


def encoding(case: dict[str, Any]) -> tuple[int, Callable[[], object]]:
    """The same of one matrix of patterns of signs."""
    import torch

    from flexmerge_cli.residuals.sign_runs import SignRuns

    coder, matrix = SignRuns(run=case["sign_runs"]), torch.ones(case["shape"])
    coder.encode(matrix[:10], "F32")
    return coder.workspace(tuple(case["shape"])), lambda: coder.encode(matrix, "F32")


def _making(*family: Any) -> tuple[int, Callable[[], object]]:
    return 0, lambda: make_family(*family)


def main() -> None:
    import tempfile

    import torch

    import flexmerge_cli.bundle.write
    import flexmerge_cli.report.bundle  # noqa: F401
    from flexmerge_cli.methods.registry import all_methods

    torch.set_num_threads(1)
    all_methods()
    folder, cases = Path(sys.argv[1]), json.loads(sys.stdin.read())
    for case in cases:
        if "sign_runs" in case:
            case["told"], case["peak"] = in_child(partial(encoding, case))
            continue
        family = (folder, case["family"], case["tasks"], case.get("dtype", "float32"), case.get("kind", ""))
        in_child(partial(_making, *family))  # what it leaves behind would be had again, and not counted
        plan = make_family(*family)
        with tempfile.TemporaryDirectory(dir=folder) as output:
            prepare = planning if "statistics" in case else merging
            case["told"], case["peak"] = in_child(partial(prepare, case, plan, Path(output) / "bundle"))
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
