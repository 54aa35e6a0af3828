"""Lists the kinds by name."""

from flexmerge_cli.evaluation.kinds import (
    causal_lm,
    command,
    dense,
    image_classification,
    lm_eval,
    python,
    regression,
    retrieval,
    text2text,
    text_classification,
    zero_shot,
)
from flexmerge_cli.evaluation.kinds.kind import Kind

_MODULES = (
    image_classification, zero_shot, retrieval, text_classification, regression, text2text, causal_lm, lm_eval, python,
    command,
)  # fmt: skip
KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (*(module.KIND for module in _MODULES), dense.SEGMENTATION, dense.DEPTH)
}


def kind_of(written: str) -> Kind | None:
    """Return the kind of a name. `python:module:function` is of kind `python`; None for an unknown kind."""
    return KINDS.get("python" if written.startswith("python:") else written)
