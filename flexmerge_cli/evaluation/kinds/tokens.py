"""Loads a task's own tokenizer, and makes batches of token ids. Knows no metric."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation.kinds.kind import Place
from flexmerge_cli.evaluation.loading import quiet_transformers, read_config

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model",
         "sentencepiece.bpe.model")  # fmt: skip
UNBOUNDED = 1_000_000  # a tokenizer without a maximum length reports a far larger number
OFFSET = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2}  # positions that these keep for padding


def load_tokenizer(place: Place) -> Any:
    """Load the tokenizer from the task's side files. Raises UsageError."""
    if not any((place.side / name).is_file() for name in FILES):
        raise place.error("kind", f"no tokenizer in {place.side}", hint="put the tokenizer's files beside the weights")
    return open_tokenizer(place.side, place)


def open_tokenizer(side: Path, place: Place) -> Any:
    try:
        return read_tokenizer(side)
    except DataError as error:
        raise place.error("kind", error.message, hint="check its files") from None


def read_tokenizer(side: Path) -> Any:
    """Return the tokenizer of a folder. Raises DataError."""
    transformers = quiet_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(side, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # malformed files raise errors of many kinds
        said = str(error).split("\n")[0][:200]
        raise DataError(f"the tokenizer in {side} cannot be opened: {said}", hint="check its files") from None


def max_length(tokenizer: Any, side: Path, wanted: int | None) -> int | None:
    """Return the most tokens of an input: as requested, else the tokenizer's, else the config's. None means no
    limit."""
    if wanted is not None:
        return wanted
    if tokenizer.model_max_length < UNBOUNDED:
        return int(tokenizer.model_max_length)
    return num_positions(side)


def num_positions(side: Path) -> int | None:
    """Return the most tokens that a model has positions for, by its config. None means no limit."""
    config = read_config(side)
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(positions, int) or positions <= 0 or config.get("model_type") == "t5":
        return None
    return positions - OFFSET.get(str(config.get("model_type")), 0)


def padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> tuple[Any, Any]:
    """Make token ids and attention mask, int64 [batch, longest], padded to the right, or to the left."""
    import torch

    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), fill, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[index, place], mask[index, place] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
