"""Matches the patterns of `--method-for` with the names of a plan's blocks, to find each block's method. Pure."""

import fnmatch
from collections.abc import Sequence

from flexmerge_cli.errors import UsageError
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.methods.use import MethodUse
from flexmerge_cli.request.choices import BlockMethod


def matching(plan: Plan, block_methods: Sequence[BlockMethod]) -> list[BlockMethod | None]:
    """Return the first pattern that each block of the plan matches, if any.

    Raises UsageError for a pattern that no block matches.
    """
    names = [block.name for block in plan.blocks]
    for item in block_methods:
        if not fnmatch.filter(names, item.pattern):
            raise UsageError(f"no block matches `{item.pattern}`", hint=f"blocks are {', '.join(names[:3])}, …")
    return [next((item for item in block_methods if fnmatch.fnmatchcase(name, item.pattern)), None) for name in names]


def uses_of_blocks(plan: Plan, block_methods: Sequence[BlockMethod], otherwise: MethodUse) -> list[MethodUse | None]:
    """Return the method of each block; None where its tasks are kept apart."""
    return [otherwise if item is None else item.use for item in matching(plan, block_methods)]
