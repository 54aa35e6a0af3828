"""Recognises checkpoints, plans and bundles by their content, never by their name. Needs no torch."""

from enum import StrEnum

from flexmerge_cli.bundle.locate import holds_bundle
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, is_bundle, standing
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.checkpoint import find_weights
from flexmerge_cli.checkpoint.choose import WEIGHT_SUFFIXES
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.errors import UsageError
from flexmerge_cli.regular_file import check_kind, open_file
from flexmerge_cli.text import expanded


class SourceKind(StrEnum):
    CHECKPOINT = "checkpoint"
    PLAN = "plan"
    BUNDLE = "bundle"


def recognise(source: str, access: Access = ONLINE) -> SourceKind:
    """Recognise the kind of a source; a missing one counts as a checkpoint. Raises UsageError for other files."""
    path = standing(expanded(source))
    if is_remote(source):
        return SourceKind.BUNDLE if holds_bundle(source, access) else SourceKind.CHECKPOINT
    if not path.exists():
        return SourceKind.CHECKPOINT  # opening it reports what is wrong
    check_kind(path)
    if path.is_dir():
        # This holds also if the manifest is missing or damaged, so that the problem is reported.
        if (path / "weights").is_dir() and any((path / name).exists() for name in (MANIFEST_NAME, "tasks", "coded")):
            return SourceKind.BUNDLE
        if is_bundle(path):
            return SourceKind.BUNDLE
        if find_weights(path) is None:
            inside = sorted(str(child) for child in path.iterdir() if child.is_dir() and find_weights(child))
            if inside:
                raise UsageError(f"{source} holds {len(inside)} checkpoints", hint=f"flexmerge inspect {inside[0]}")
        return SourceKind.CHECKPOINT
    if path.suffix in WEIGHT_SUFFIXES:
        return SourceKind.CHECKPOINT
    if path.name == MANIFEST_NAME or path.name.endswith(".index.json"):
        raise UsageError(
            f"{source} is a file of a checkpoint or bundle folder", hint=f"flexmerge inspect {path.parent}"
        )
    if path.suffix in (".yaml", ".yml"):
        raise UsageError(
            f"{source} may be a recipe, but `inspect` shows plans", hint=f"flexmerge plan {source} -o plan.json"
        )
    with open_file(path) as file:
        if file.read(64).lstrip()[:1] != b"{":
            raise UsageError(f"{source} is not a checkpoint, plan or bundle", hint="give a folder or a plan.json")
    return SourceKind.PLAN
