"""The kinds by name."""

from flexmerge_cli.evaluation.kinds import image_classification
from flexmerge_cli.evaluation.kinds.kind import Kind

KINDS: dict[str, Kind] = {kind.name: kind for kind in (image_classification.KIND,)}
