"""Says where no output may lie. publish.py (for files: writing.py) says whether a place is free, and what `--force`
replaces."""

from collections.abc import Iterable
from pathlib import Path

from flexmerge_cli.bundle.manifest_file import is_bundle
from flexmerge_cli.errors import UsageError
from flexmerge_cli.text import expanded


def check_apart(output: Path, inputs: Iterable[Path | str | None]) -> None:
    """Refuse an output that is one of the inputs, lies in one or in any bundle, or has an input in it.

    inputs: paths; None and addresses (`hf://…`) are passed over. Raises UsageError.
    """
    place = output.resolve()
    for source in inputs:
        if source is None or "://" in str(source):
            continue
        other = expanded(source).resolve()
        if place == other or place in other.parents or other in place.parents:
            how = "is" if place == other else "lies in" if other in place.parents else "contains"
            raise UsageError(f"the output {output} {how} the input {source}", hint="choose another place")
    for folder in place.parents:
        if is_bundle(folder):  # The manifest does not list the output, so --force would no longer replace the bundle.
            raise UsageError(f"the output {output} lies in the bundle {folder}", hint="choose another place")
