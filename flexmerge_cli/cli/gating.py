"""The end of a command whose document holds a verdict: print the whole document, then exit with 6 on failure."""

from collections.abc import Callable
from typing import Any

from flexmerge_cli.cli.options import emit
from flexmerge_cli.errors import GateError
from flexmerge_cli.evaluation.gate import require_pass


def finish(value: dict[str, Any], what: str, *, as_json: bool, show: Callable[[Any], None]) -> None:
    """Print a document. Raises GateError if its choice or gate is not met; with --json the error carries it."""
    chosen = value.get("chosen")
    try:
        if chosen is not None and not chosen["qualifies"]:
            raise GateError(chosen["message"], hint="try larger --sizes, other --methods, or more examples")
        if chosen is None and "gate" in value:
            require_pass(value["gate"], what)
    except GateError as error:
        error.document = value
        if not as_json:
            show(value)
        raise
    emit(value, as_json=as_json, show=show)
