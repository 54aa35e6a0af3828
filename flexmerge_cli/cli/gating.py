"""How a command ends whose document holds a verdict: the document is told first, then exit 6 unless all passes."""

import sys
from typing import Any

import typer

from flexmerge_cli.errors import GateError
from flexmerge_cli.evaluation.gate import require_pass


def end_by_gate(value: dict[str, Any], what: str, *, as_json: bool) -> None:
    """Raises GateError; with --json, where stdout has its one document already, only exits."""
    if "gate" not in value:
        return
    try:
        require_pass(value["gate"], what)
    except GateError as error:
        end(error, as_json=as_json)
    if not as_json:
        print(f"gate: {value['gate']['message']}")


def end_by_choice(chosen: dict[str, Any], *, as_json: bool) -> None:
    """Tells what was chosen, and the command that builds it. Raises GateError if nothing qualifies."""
    if not chosen["qualifies"]:
        end(GateError(chosen["message"], hint="larger --sizes, other --methods, or more examples"), as_json=as_json)
    if not as_json:
        print(f"{chosen['message']}\n{chosen['command']}")


def end(error: GateError, *, as_json: bool) -> None:
    """Raises it, or, where a document was printed that tells it, exits as it would."""
    if not as_json:
        raise error
    print(f"error: {error.message}", file=sys.stderr)
    print(f"hint: {error.hint}", file=sys.stderr)
    raise typer.Exit(error.exit_code)
