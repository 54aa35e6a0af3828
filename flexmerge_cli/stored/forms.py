"""The table of stored forms: the manifest's word for a group's form -> what reads it."""

from collections.abc import Callable, Mapping

from flexmerge_cli.errors import DataError
from flexmerge_cli.stored.coded import coded_tensor
from flexmerge_cli.stored.decoding import Described, RouteParts, Stored
from flexmerge_cli.stored.masked import MaskedTensor

READERS: Mapping[str, Callable[[Described, RouteParts], Stored]] = {
    "masked": lambda described, _parts: MaskedTensor(described),
    "residual": coded_tensor,
}
"""The other forms are dense: a part on the task's route has the tensor's plain name."""


def stored_as(kind: str, described: Described, parts: RouteParts) -> Stored:
    """How a tensor without a dense part is decoded. Raises DataError if the manifest does not say so soundly."""
    if kind not in READERS:
        name, task = described.tensor, described.task
        raise DataError(f"{parts.path}: `{name}` is in no file of `{task}`", hint="fetch the bundle again")
    return READERS[kind](described, parts)
