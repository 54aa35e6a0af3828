"""Plans without weights: any number of tasks and blocks, names of one's choice."""

import numpy as np

from flexmerge_cli.allocation.plan_file import NO_DIGEST, Plan, PlanTensor, plan_bytes
from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.order.order import count_near_ties, merge_order
from flexmerge_cli.order.similarity import Similarity
from flexmerge_cli.plan import block_measure

PARTS = ("norm1", "attention", "norm2", "mlp")


def synthetic_plan(
    num_tasks: int,
    num_blocks: int,
    *,
    linkage: Linkage = Linkage.COMPLETE,
    similarity: Similarity = Similarity.COSINE,
    prefix: str = "",
    seed: int = 0,
) -> Plan:
    """Blocks of two tensors, the later ones the less alike; `prefix` goes before every name of task and tensor."""
    rng = np.random.default_rng(seed)
    tasks = sorted(f"{prefix}task{number:02d}" for number in range(num_tasks))
    names = [f"{prefix}encoder.layers.{number // 4}.{PARTS[number % 4]}" for number in range(num_blocks)]
    tensors, blocks, measures = [], [], []
    for place, name in enumerate(names):
        of_block = []
        for part in ("weight", "bias"):
            shared, own = rng.normal(size=(3, 24)), rng.normal(size=(num_tasks, 24)) * (0.3 + place / num_blocks)
            deltas = shared[np.arange(num_tasks) % 3] + own
            product = deltas @ deltas.T
            record = {
                "name": f"{name}.{part}", "class": "mergeable", "reason": "", "dtype": "F32", "shape": [24],
                "base_dtype": "F32", "dtypes": None, "shapes": None, "block": name, "digests": ["0" * 32] * num_tasks,
                "base_digest": "0" * 32, "same": list(range(num_tasks)), "is_base": [False] * num_tasks,
                "gram": ((product + product.T) / 2).tolist(), "base_energy": 100.0, "agreement": None, "finite": True,
            }  # fmt: skip
            tensors.append(record)
            of_block.append(PlanTensor.model_validate(record))
        measures.append(block_measure(name, of_block))
        blocks.append({"name": name, "tensors": [tensor.name for tensor in of_block], "elements": 48})
    order = merge_order(measures, linkage=linkage, similarity=similarity)
    model_bytes = 4 * 48 * num_blocks
    fields = {
        "format": "flexmerge.plan/1", "generator": "flexmerge 0", "sha256": NO_DIGEST, "one_model_bytes": model_bytes,
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
    return Plan.model_validate_json(plan_bytes(fields))
