"""Plans without weights: any number of tasks and blocks, names of one's choice."""

from typing import Any

import numpy as np

from flexmerge_cli.allocation.block_measure import block_measure
from flexmerge_cli.formats.plan_file import Plan, sealed_plan
from flexmerge_cli.formats.plan_records import PlanTensor
from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.order.order import count_near_ties, merge_order
from flexmerge_cli.order.similarity import Similarity
from flexmerge_cli.record import NO_SHA256

PARTS = ("norm1", "attention", "norm2", "mlp")
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
NUM_ELEMENTS = 24


def synthetic_plan(
    num_tasks: int,
    num_blocks: int,
    *,
    linkage: Linkage = Linkage.COMPLETE,
    similarity: Similarity = Similarity.COSINE,
    mixed: bool = False,
    prefix: str = "",
    seed: int = 0,
) -> Plan:
    """Blocks of two tensors, the later ones the less alike.

    mixed: some tensors of a task are bit-identical to another's, and dtypes differ.
    prefix: stands before every source and tensor.
    """
    rng = np.random.default_rng(seed)
    tasks = [f"task{number:02d}" for number in range(num_tasks)]
    names = [f"{prefix}encoder.layers.{number // 4}.{PARTS[number % 4]}" for number in range(num_blocks)]
    tensors: list[dict[str, Any]] = []
    blocks, measures = [], []
    for place, name in enumerate(names):
        of_block = []
        for part in ("weight", "bias"):
            record = _tensor(rng, f"{name}.{part}", name, num_tasks, apart=0.3 + place / num_blocks, mixed=mixed)
            tensors.append(record)
            of_block.append(PlanTensor.model_validate(record))
        measures.append(block_measure(name, of_block))
        blocks.append({"name": name, "tensors": [tensor.name for tensor in of_block], "elements": 2 * NUM_ELEMENTS})
    order = merge_order(measures, linkage=linkage, similarity=similarity)
    model_bytes = 8 * NUM_ELEMENTS * num_blocks
    fields = {
        "format": "flexmerge.plan/1", "generator": "flexmerge 0", "sha256": NO_SHA256,
        "one_model_bytes": model_bytes,
        "base": {"source": f"{prefix}base", "fingerprint": "0" * 32},
        "tasks": [
            {"name": task, "source": f"{prefix}{task}", "fingerprint": "0" * 32, "bytes": model_bytes, "files": {},
             "names": {}, "config_base": None}
            for task in tasks
        ],
        "tensors": tensors, "blocks": blocks,
        "order": [
            {"block": names[merge.block], "left": merge.left, "right": merge.right, "similarity": merge.similarity}
            for merge in order
        ],
        "settings": {"blocks": "component", "rules": None, "linkage": str(linkage), "strategy": "greedy",
                     "similarity": str(similarity), "seed": 0, "private": [], "merge_heads": False},
        "near_ties": count_near_ties(order),
    }  # fmt: skip
    return sealed_plan(fields)


def _tensor(
    rng: np.random.Generator, name: str, block: str, num_tasks: int, *, apart: float, mixed: bool
) -> dict[str, Any]:
    deltas = rng.normal(size=(3, NUM_ELEMENTS))[np.arange(num_tasks) % 3]
    deltas = deltas + rng.normal(size=(num_tasks, NUM_ELEMENTS)) * apart
    same, dtypes = list(range(num_tasks)), ["F32"] * num_tasks
    if mixed:
        dtypes = [str(dtype) for dtype in rng.choice(list(ITEM_BYTES), num_tasks)]
        for task in range(1, num_tasks):
            if rng.random() < 0.4:
                same[task] = same[int(rng.integers(task))]
                deltas[task], dtypes[task] = deltas[same[task]], dtypes[same[task]]
    product = deltas @ deltas.T
    return {
        "name": name, "class": "mergeable", "reason": "", "dtype": dtypes[0], "shape": [NUM_ELEMENTS],
        "base_dtype": "F32", "dtypes": dtypes, "shapes": None, "block": block,
        "digests": [f"{representative:032x}" for representative in same],
        "base_digest": "0" * 32, "same": same, "is_base": [False] * num_tasks,
        "gram": ((product + product.T) / 2).tolist(), "base_energy": 100.0, "agreement": None, "finite": True,
    }  # fmt: skip
