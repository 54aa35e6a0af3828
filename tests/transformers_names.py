"""Writes flexmerge_cli/family/transformers_names.json: how transformers renames the tensors of files on loading.

python -m tests.transformers_names        (transformers 5; the file says which version it was made from)
"""

import json
import re
from pathlib import Path
from typing import Any

PLACE = Path(__file__).parents[1] / "flexmerge_cli/family/transformers_names.json"


def names() -> dict[str, Any]:
    """The contents of the file: {"version", "rules": {model type: [[[regex, replacement], …], …]}}.

    A model type has one list for itself and one for each of its classes with rules of its own. Renames that do more
    than replace a match, and conversions of values, are left out.
    """
    import transformers
    from transformers import conversion_mapping as conversions

    plain = (conversions.WeightRenaming, conversions.PrefixChange, conversions.GroupWeightRename)
    found: dict[str, list[list[list[str]]]] = {}
    for key, transforms in sorted(conversions._build_checkpoint_conversion_mapping().items()):
        kind = key if key[0].islower() else _model_type(transformers, key)
        rules = [
            [re.sub(r"\(\?P<g\d+>", "(?:", pattern), target]
            for transform in transforms
            if type(transform) in plain
            for pattern, target in _pairs(transform)
        ]
        if kind is not None and rules and rules not in found.setdefault(kind, []):
            found[kind].append(rules)
    return {
        "version": transformers.__version__,
        "rules": {kind: lists for kind, lists in sorted(found.items()) if lists},
    }


def _pairs(transform: Any) -> list[tuple[str, str]]:
    targets = transform.target_patterns
    pairs = []
    for number, source in enumerate(transform.source_patterns):
        pattern = source.replace("*.", r".*\.")
        pattern += r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else ""
        pairs.append((pattern, targets[number if len(targets) == len(transform.source_patterns) else 0]))
    return sorted(pairs, key=lambda pair: -len(pair[0]))


def _model_type(transformers: Any, class_name: str) -> str | None:
    found = getattr(transformers, class_name, None)
    if found is None:
        for module in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
            if f"class {class_name}(" in module.read_text():
                return module.parent.name
    config = getattr(found, "config_class", None)
    return getattr(config, "model_type", None)


if __name__ == "__main__":
    PLACE.write_text(json.dumps(names(), separators=(",", ":")).replace(']],"', ']],\n"') + "\n")
