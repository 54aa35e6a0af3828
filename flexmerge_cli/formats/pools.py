"""Refuses what cannot be had of a pool of LoRA adapters, whose tensors merge by their products. Pure."""

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.products import merges_products
from flexmerge_cli.request.choices import Auto, Clusters, Servable
from flexmerge_cli.request.merge import MergeRequest


def check_request(request: MergeRequest) -> None:
    """Raise UsageError for a request that cannot merge the factors; what engines serve is checked elsewhere."""
    if isinstance(request.choice, Servable):
        return
    if isinstance(request.choice, Clusters | Auto):
        raise UsageError(
            "a pool of LoRA adapters merges along the merge order only, by a method that stores one value per module",
            hint="--method average --size 2x; or plan with --adapters merge",
        )
    for use in request.uses:
        if not merges_products(use.call) or use.steps or use.calibrate is not None:
            raise UsageError(
                f"`{use.call.method.name}` cannot merge a pool of LoRA adapters: a pool merges one ΔW per module",
                hint="use average, task_arithmetic or magmax, without --step and --calibrate, or plan --adapters merge",
            )
