"""Pack many fine-tuned models of one base into a bundle of any size between one model and all of them.

    from flexmerge_cli import make_plan, load_plan, merge, open_bundle

    bundle = open_bundle("bundle/")
    weights = bundle.view("sst2")      # name -> tensor, mapped from the file
    model = bundle.model("sst2")       # the transformers model

Nothing heavy is imported before it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flexmerge_cli.version import VERSION as __version__

if TYPE_CHECKING:
    from flexmerge_cli.api import (
        OrderSettings,
        calibrate,
        change_plan,
        diff,
        draw_curve,
        evaluate,
        export,
        load_plan,
        make_plan,
        merge,
        merge_sizes,
        open_bundle,
        push,
        tune,
        update,
        verify,
    )

__all__ = [
    "OrderSettings",
    "__version__",
    "calibrate",
    "change_plan",
    "diff",
    "draw_curve",
    "evaluate",
    "export",
    "load_plan",
    "make_plan",
    "merge",
    "merge_sizes",
    "open_bundle",
    "push",
    "tune",
    "update",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("flexmerge_cli.api"), name)
    raise AttributeError(f"module 'flexmerge_cli' has no attribute '{name}'")
