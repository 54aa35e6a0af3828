"""Writes flexmerge_cli/family/transformers_names.json: how transformers renames the tensors of files on loading.

python -m tests.transformers_names        (transformers 5; the file says which version it was made from)
"""

import json
import re
from pathlib import Path
from typing import Any

PLACE = Path(__file__).parents[1] / "flexmerge_cli/family/transformers_names.json"


def names() -> dict[str, Any]:
    """The contents of the file: {"version", "rules": {model type: [[[regex, replacement], …], …]}, "forms"}.

    A model type has one list for itself and one for each of its classes with rules of its own. Renames that do more
    than replace a match are left out. forms: model type -> {"rows": [[whole, [part, …]], …], "turned": [[old, new],
    …]}, in parts of names: tensors that are the rows of others one after another, and those whose last two axes change
    places. Other conversions are of experts (family/experts.py), or change more than where values are.
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
        "forms": _forms(transformers, conversions),
    }


def _forms(transformers: Any, conversions: Any) -> dict[str, dict[str, list[Any]]]:
    found: dict[str, dict[str, list[Any]]] = {}
    for key, transforms in sorted(conversions._build_checkpoint_conversion_mapping().items()):
        kind = key if key[0].islower() else _model_type(transformers, key)
        for transform in transforms:
            name, form = _form(transform)
            if kind is not None and form and form not in found.setdefault(kind, {}).setdefault(name, []):
                found[kind][name].append(form)
    return {
        kind: {name: forms for name, forms in of.items() if forms}
        for kind, of in sorted(found.items())
        if any(of.values())
    }


def _form(transform: Any) -> tuple[str, list[Any]]:
    """rows or turned, and what it is made of; empty if it is something else."""
    operations = [(type(one).__name__, vars(one)) for one in getattr(transform, "operations", ())]
    sources, targets = ([name.replace("\\.", ".") for name in names] for names in _patterns(transform))
    if len(operations) != 1 or any(set(name) & set("*()[]^$\\|?+") for name in (*sources, *targets)):
        return "rows", []
    (operation, options), whole, parts = operations[0], sources, targets
    if operation == "Transpose" and len(sources) == len(targets) == 1 and options["dim1"] == options["dim0"] + 1:
        return "turned", [sources[0], targets[0]]
    if operation == "Concatenate":
        whole, parts = parts, whole
    is_rows = operation in ("Chunk", "Split", "Concatenate") and options["dim"] == 0
    return "rows", [whole[0], parts] if is_rows and len(whole) == 1 and len(parts) > 1 else []


def _patterns(transform: Any) -> tuple[list[str], list[str]]:
    return list(transform.source_patterns), list(transform.target_patterns)


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
