"""Warns about groups of near-duplicates, which sums multiply and sum-based masks lose. Pure; no tensors.

Grouping by similarity produces such groups, so users are warned about methods that suffer from them.
"""

from collections.abc import Sequence

from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.linear import mean_weight

# The smallest cosine of near-duplicates, and the largest factor that needs no warning.
NEAR, TOLERATED = 0.9, 2.0


def near_duplicate_warning(call: Call, tasks: Sequence[str], smallest_cosine: float) -> str | None:
    """Return a warning about this method on near-duplicates, with an alternative; None if there is no problem.

    tasks: names of the group's tasks. smallest_cosine: the smallest over all pairs of its task vectors.
    """
    name, args, k = call.method.name, call.args, len(tasks)
    if smallest_cosine < NEAR or k < 2 or (call.method.gives_masks and k == 2):
        return None
    group = f"{k} near-duplicates (smallest cosine {smallest_cosine:.2f}: {', '.join(tasks)})"
    if name == "tall_masks" and args["lam"] * (k - 1) >= 1:
        return f"`tall_masks`: nearly empty masks for {group}, which fall back to the base; take consensus"
    if name == "consensus_original" and args["lam"] * (k - 1) >= 1 and args["kappa"] > 0:
        return f"`consensus_original`: removes nearly everything from {group}; take consensus, or a smaller lam"
    factor = copies_factor(call, tasks)
    if factor > TOLERATED:
        instead = INSTEAD.get(name, "a smaller scale")
        return f"`{name}`: multiplies {group} by about {factor:.3g}; take {instead}"
    return None


INSTEAD = {
    "task_arithmetic": "form=mean",
    "weighted_average": "normalize=true",
    "ties": "merge=mean",
    "breadcrumbs": "merge=mean",
    "della": "merge=mean",
    "tall_masks": "consensus",
}


def copies_factor(call: Call, tasks: Sequence[str]) -> float:
    """Return the factor by which a sum form scales k copies of one task; 1 for every other method."""
    name, args, k = call.method.name, call.args, len(tasks)
    scale = 1.0 if args.get("scale") is None else args["scale"]
    if name == "task_arithmetic" and args["form"] == "sum":
        return k * (0.3 if args["scale"] is None else scale)
    if name == "weighted_average" and not args["normalize"]:
        return sum(mean_weight(args["weights"], task) for task in tasks)
    if name == "breadcrumbs" and args["merge"] == "sum":
        return k * (0.3 if args["scale"] is None else scale)
    if name in ("ties", "della") and args["merge"] == "sum":
        return k * scale
    if name in ("tall_masks", "consensus_original"):
        return k * scale
    return 1.0
