"""Spells tensor names as other versions of the same library do. No weights.

What training wrappers put into names (`_orig_mod.`) is dropped, and torch's two names of a normalised weight become
one. How transformers renames the tensors of files on loading, by model type, is in transformers_names.json, which
`python -m tests.transformers_names` writes; transformers itself is not imported.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flexmerge_cli.json_file import parse_json

Spelling = Callable[[str], str]

# The segments that torch.compile, DDP, FSDP, activation checkpointing and Opacus insert anywhere in a name.
WRAPPED = frozenset({"_orig_mod", "module", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
ENDS = (
    ("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"),
    ("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"),
)  # fmt: skip
PARTS = ("text_config", "vision_config", "audio_config", "language_config", "encoder", "decoder", "backbone_config")
MAX_DEPTH = 3  # of configs in configs
# Longer names are left as they are: a pattern may scan a name once for each of its characters.
MAX_CHARACTERS = 1000


def plain(name: str) -> str:
    """Return the name without the segments that training inserted. A name that consists only of such segments is left
    as it is."""
    if len(name) > MAX_CHARACTERS:
        return name
    kept = ".".join(segment for segment in name.split(".") if segment not in WRAPPED)
    for end, spelled in ENDS:
        if kept == end or kept.endswith(f".{end}"):
            kept = kept.removesuffix(end) + spelled
    return kept or name


def by_type(model_types: Iterable[str]) -> Iterator[Spelling]:
    """Yield the spellings that transformers has for these model types: all of them one after another, then each
    alone."""
    every = [rules for model_type in model_types for rules in _renames().get(model_type, ())]
    if len(every) > 1:
        yield _spelling([rule for rules in every for rule in rules])
    for rules in every:
        yield _spelling(rules)


def model_types(*configs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the model types that configs name, for the whole and for its parts; each once, in order."""
    return tuple(dict.fromkeys(found for config in configs for found in _types(config)))


def spelled(names: Iterable[str], spelling: Spelling) -> dict[str, str]:
    """Map each own name to its spelled name, one to one: names that would coincide keep their own."""
    own = list(names)
    found = {name: spelling(name) for name in own}
    counts: dict[str, int] = {}
    for name in found.values():
        counts[name] = counts.get(name, 0) + 1
    unique = {name: new if counts[new] == 1 else name for name, new in found.items()}
    return unique if len(set(unique.values())) == len(own) else {name: name for name in own}


def _spelling(rules: list[list[str]]) -> Spelling:
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def apply(name: str) -> str:
        if len(name) > MAX_CHARACTERS:
            return name
        for pattern, replacement in compiled:
            if match := pattern.search(name):
                new = match.expand(replacement) if "\\" in replacement else replacement
                name = name[: match.start()] + new + name[match.end() :]
        return name

    return apply


def forms() -> dict[str, dict[str, list[Any]]]:
    """Return by model type the tensors that are the `rows` of others, and those that are `turned`, with two axes
    swapped."""
    return _known()["forms"]


@cache
def _known() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = parse_json((Path(__file__).parent / "transformers_names.json").read_bytes())
    return found


def _renames() -> dict[str, list[list[list[str]]]]:
    """Return lists of (regular expression, replacement) by model type."""
    return _known()["rules"]


def _types(config: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for part in PARTS:
        if isinstance(config.get(part), Mapping) and depth < MAX_DEPTH:
            yield from _types(config[part], depth + 1)
