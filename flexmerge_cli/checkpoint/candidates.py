"""What lies in a folder with one subfolder per model: models, what should be one and has no weights, and the rest.

Names in, a verdict out; no I/O. A model that is passed over in silence is missing from all that follows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from flexmerge_cli.checkpoint.choose import weight_files

MODEL_FILE = re.compile(
    r"(adapter_|generation_|preprocessor_|processor_)?config\.json|model_index\.json|.*\.index\.json"
    r"|tokenizer.*|vocab\.(txt|json)|merges\.txt|special_tokens_map\.json|spiece\.model|sentencepiece.*\.model"
)
STEP = re.compile(r"checkpoint-\d+")  # as trainers save while they run


@dataclass(slots=True)
class Candidates:
    """By name; what begins with a dot is passed over."""

    models: dict[str, str] = field(default_factory=dict)
    """Name -> source."""
    unfinished: dict[str, str] = field(default_factory=dict)
    """Name -> what makes it look like a model, and what is missing."""
    others: dict[str, str] = field(default_factory=dict)
    """Name -> why it is none."""

    def add_folder(self, name: str, inside: Sequence[str]) -> None:
        """A folder without weights that can be taken. inside: paths in it, at least of two levels."""
        if why := why_unfinished(inside):
            self.unfinished[name] = why
        else:
            self.others[name] = "no model"

    def add_file(self, name: str) -> None:
        self.others[name] = f"a weight file: --task NAME=…/{name} takes it" if weight_files([name]) else "a file"


def why_unfinished(inside: Sequence[str]) -> str | None:
    """Why a folder without weights that can be taken should hold a model; None where nothing says so."""
    if several := weight_files([name for name in inside if "/" not in name]):
        return f"holds {', '.join(several[:3])}, and it is unclear which of them is the model"
    split = [name.partition("/") for name in inside]
    deeper = [folder for folder, slash, rest in split if slash and (STEP.fullmatch(folder) or weight_files([rest]))]
    if deeper:
        return f"has no weights of its own; look in {sorted(deeper)[0]}/"
    found = sorted(name for name in inside if MODEL_FILE.fullmatch(name))
    return f"holds {found[0]} and no weights" if found else None
