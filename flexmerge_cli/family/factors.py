"""Finds the tensors that are the two factors of one matrix, by their names: what LoRA adapters store. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from flexmerge_cli.family.blocks import Block, partition


def factor_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return (A, B) of every module that has both."""
    known = set(names)
    found = []
    for name in sorted(known):
        other = name.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")
        if other != name and other in known:
            found.append((name, other))
    return found


def partition_pairs(names: Sequence[str], blocks: str | Path) -> tuple[Block, ...]:
    """Partition like `partition`, with both factors of a LoRA in one block, because their product is what merges."""
    of_module: dict[str, list[str]] = {}
    for name in names:
        segments = name.split(".")
        at = next((i for i, segment in enumerate(segments) if segment.startswith("lora_")), None)
        of_module.setdefault(name if at is None else ".".join([*segments[:at], "weight"]), []).append(name)
    return tuple(
        replace(block, tensors=tuple(name for module in block.tensors for name in of_module[module]))
        for block in partition(list(of_module), blocks)
    )
