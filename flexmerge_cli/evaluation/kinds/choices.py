"""Reads multiple choice: the choices of each example, and the right one. Texts in, texts and numbers out."""

from collections.abc import Sequence

from flexmerge_cli.evaluation.data import Column, Table
from flexmerge_cli.evaluation.kinds.kind import Place


def choice_columns(written: str | tuple[str, ...] | None) -> dict[str, Column]:
    """Return one column of lists, or one column per choice."""
    if written is None or isinstance(written, str):
        return {"choices": Column(name=written, usual=("choices", "options", "endings"))}
    return {f"choices.{number}": Column(name=name) for number, name in enumerate(written)}


def choices_of(table: Table, written: str | tuple[str, ...] | None, place: Place) -> list[list[str]]:
    """Return the choices of each example, at least one. Raises UsageError."""
    if written is not None and not isinstance(written, str):
        columns = [table.texts(f"choices.{number}", place) for number in range(len(written))]
        return [list(row) for row in zip(*columns)]
    found = []
    for index, value in enumerate(table.columns["choices"]):
        value = value.get("text") if isinstance(value, dict) else value  # as in ARC: {text: […], label: […]}
        if not isinstance(value, list | tuple) or not value or not all(isinstance(text, str) for text in value):
            raise place.error(
                "columns.choices",
                f"`{table.names['choices']}` in {table.row(index)} is not a list of texts",
                hint="check it",
            )
        found.append(list(value))
    return found


def right_choice(table: Table, index: int, choices: Sequence[str], place: Place) -> int:
    """Return the right choice, given by index from 0, by letter (A is the first), or by its text. Raises UsageError."""
    value = table.columns["label"][index]
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    if isinstance(value, str) and len(value) == 1 and value.upper() in "ABCDEFGHIJ":
        number = ord(value.upper()) - ord("A")
    else:
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = -1
    if not 0 <= number < len(choices):
        raise place.error(
            "columns.label",
            f"{table.row(index)} has label {str(value)[:60]!r}, and {len(choices)} choices",
            hint=f"labels are 0 to {len(choices) - 1}, letters from A, or a choice's text",
        )
    return number
