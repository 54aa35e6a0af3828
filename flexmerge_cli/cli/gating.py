"""Ends a command whose document holds a verdict: prints the whole document, then exits with 6 on failure."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flexmerge_cli.cli.output import emit
from flexmerge_cli.cli.terminal import OutputLost
from flexmerge_cli.errors import GateError
from flexmerge_cli.evaluation.gate import require_pass


def finish(
    value: dict[str, Any],
    what: str,
    *,
    as_json: bool,
    show: Callable[[Any], None],
    quiet: bool = False,
    written: Sequence[Path] = (),
) -> None:
    """Print a document. written: as in `emit`.

    Raises GateError if its choice or gate is not met; with --json the error carries the document.
    """
    chosen = value.get("chosen")
    try:
        if chosen is not None and not chosen["qualifies"]:
            raise GateError(chosen["message"], hint="try larger --sizes, another --method, or more examples")
        if chosen is None and "gate" in value:
            require_pass(value["gate"], what)
    except GateError as error:
        error.document = value
        if not as_json:
            with suppress(OutputLost):  # the verdict is more important
                emit(value, as_json=False, quiet=quiet, show=show)
        raise
    emit(value, as_json=as_json, quiet=quiet, show=show, written=written)
