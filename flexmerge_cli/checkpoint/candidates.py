"""Sorts the subfolders of a folder of models: models, unfinished models without weights, and everything else.

Names in, a verdict out; no I/O. Nothing is skipped silently, since a missing model would affect every later step.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from flexmerge_cli.checkpoint.choose import weight_files
from flexmerge_cli.checkpoint.foreign import of_files, shards

MODEL_FILE = re.compile(
    r"(adapter_|generation_|preprocessor_|processor_)?config\.json|model_index\.json|.*\.index\.json"
    r"|tokenizer.*|vocab\.(txt|json)|merges\.txt|special_tokens_map\.json|spiece\.model|sentencepiece.*\.model"
)
STEP = re.compile(r"checkpoint-\d+")  # the checkpoints that trainers save during training


@dataclass(slots=True)
class Candidates:
    """The entries of a folder, by name. Names that begin with a dot are skipped."""

    models: dict[str, str] = field(default_factory=dict)
    """The source of each model, by name."""
    unfinished: dict[str, str] = field(default_factory=dict)
    """For each unfinished model, what makes it look like a model, and what is missing."""
    others: dict[str, str] = field(default_factory=dict)
    """For each other entry, why it is not a model."""

    def add_folder(self, name: str, inside: Sequence[str]) -> None:
        """Add a folder without usable weights. inside: the paths in it, at least two levels deep."""
        if why := why_unfinished(inside):
            self.unfinished[name] = why
        else:
            self.others[name] = "no model"

    def add_file(self, name: str) -> None:
        self.others[name] = f"a weight file: --task NAME=…/{name} takes it" if weight_files([name]) else "a file"


def why_unfinished(inside: Sequence[str]) -> str | None:
    """Say why a folder without usable weights should hold a model; None if nothing suggests it."""
    names = [name for name in inside if "/" not in name]
    if (found_shards := shards(names)) is not None:
        return f"holds {found_shards[0]} of {found_shards[1]} shards, and no index of them"
    if several := weight_files(names):
        return f"holds {', '.join(several[:3])}, and it is unclear which of them is the model"
    split = [name.partition("/") for name in inside]
    deeper = [folder for folder, slash, rest in split if slash and (STEP.fullmatch(folder) or weight_files([rest]))]
    if deeper:
        return f"has no weights of its own; look in {sorted(deeper)[0]}/"
    if (known := of_files([*names, *sorted({folder for folder, slash, _ in split if slash})])) is not None:
        return f"is {known[1].what} (it holds {known[0]})"
    found = sorted(name for name in inside if MODEL_FILE.fullmatch(name))
    return f"holds {found[0]} and no weights" if found else None
