"""Reads YAML written by hand and checks it against a schema: errors name file, line, key and the nearest valid name.

Files may come from strangers: size and depth are bounded, aliases are refused (they expand without bound), and only
plain scalars, lists and maps are built. It takes one pass, in time proportional to the size: PyYAML itself takes
quadratic time over nested brackets, and over numbers of many digits.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from flexmerge_cli.errors import SourceError, UsageError
from flexmerge_cli.regular_file import read_file
from flexmerge_cli.text import holds_text

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_DIGITS = 4300  # Python's own limit for decimal numbers
MAX_KEY_DIGITS = 15
MAX_SHOWN = 100  # the most characters of a file's text in a message

Schema = TypeVar("Schema", bound=BaseModel)
Place = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A file's plain values, and the line of each."""

    path: Path
    value: Any
    lines: Mapping[Place, int]
    """The line, from 1, of each place, which is a tuple of keys and indices from the top."""

    def line(self, place: Place) -> int:
        """Return the line of the key, or of the mapping that would contain it."""
        return next((self.lines[place[:end]] for end in range(len(place), -1, -1) if place[:end] in self.lines), 1)

    def error(self, place: Place, message: str, *, hint: str, line_of: Place | None = None) -> UsageError:
        """Return the error for a problem at a key. line_of: the key whose line to report instead."""
        key = ".".join(map(str, place)) or "the file"
        line = self.line(place if line_of is None else line_of)
        return UsageError(f"{self.path}, line {line}: {key}: {message}", hint=hint)

    def check(self, schema: type[Schema], place: Place = ()) -> Schema:
        """Return the value at `place` as a `schema`. Raises UsageError with line, key and the nearest valid name."""
        value = self.value
        for step in place:
            value = value[step]
        try:
            return schema.model_validate(value)
        except ValidationError as error:
            raise _explained(self, error, schema, place) from None


def read_document(path: Path, what: str) -> Document:
    """Read a file's plain values, bounded in size and depth but not yet checked. Raises SourceError, UsageError."""
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:  # a path that no file can have
        size = None
    if size is None:
        raise SourceError(f"no {what} at {path}", hint="check the path")
    if size > MAX_BYTES:
        raise UsageError(f"{path} is larger than {MAX_BYTES} bytes", hint=f"is it a {what}?")
    lines: dict[Place, int] = {}
    try:
        text = read_file(path, MAX_BYTES, f"a {what}").decode("utf-8")
        value = load_bounded(text, on_node=lambda node: _lines(path, node, (), lines))
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text", hint=f"is it a {what}?") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error)[:MAX_SHOWN]
        raise UsageError(f"{path}{where}: {problem}", hint=f"correct the YAML, if this is a {what}") from None
    if not holds_text(value):
        raise UsageError(f"{path} holds text that no file can hold", hint=f"is it a {what}?")
    return Document(path=path, value=value, lines=lines)


class BoundedLoader(yaml.SafeLoader):
    """Refuses aliases, deep nesting and huge numbers as soon as it meets them."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            problem = f"an alias (`*{str(event.anchor)[:MAX_SHOWN]}`): write the value out"
            raise ComposerError(None, None, problem, mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ComposerError(None, None, "nested too deeply", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # Base 60, `1:30:00`, takes quadratic time, and Python's own limit does not apply to it.
        if len(node.value) > MAX_DIGITS:
            raise ConstructorError(None, None, f"a number of {len(node.value):,} digits", node.start_mark)
        return super().construct_yaml_int(node)


BoundedLoader.add_constructor("tag:yaml.org,2002:int", BoundedLoader.construct_yaml_int)


def load_bounded(
    text: str, kind: type[BoundedLoader] = BoundedLoader, on_node: Callable[[yaml.Node | None], object] | None = None
) -> Any:
    """Return the plain value of a YAML text. on_node: gets the tree first. Raises yaml.YAMLError for any error."""
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"a text of {len(text):,} characters")
    try:
        loader = kind(text)
        try:
            node = loader.get_single_node()
            if on_node is not None:
                on_node(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (RecursionError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # What PyYAML raises if a value is not of the type of its tag: `!!bool maybe`, `!!timestamp soon`.
        raise yaml.YAMLError(str(error)[:MAX_SHOWN]) from None


def _lines(path: Path, node: Any, place: Place, lines: dict[Place, int]) -> None:
    """Record the line of every key and item."""
    if node is None:
        return
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            # Huge integers can be made to collide in a dict, which then takes quadratic time.
            if not isinstance(key, yaml.ScalarNode) or (key.tag.endswith(":int") and len(key.value) > MAX_KEY_DIGITS):
                raise UsageError(f"{path}, line {line}: a key that is not a word", hint="correct the YAML")
            if key.value in seen:
                raise UsageError(f"{path}, line {line}: `{key.value[:MAX_SHOWN]}` occurs twice", hint="remove one")
            seen.add(key.value)
            lines[(*place, key.value)] = line
            _lines(path, value, (*place, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _lines(path, value, (*place, index), lines)


def _explained(document: Document, error: ValidationError, schema: type[BaseModel], inside: Place) -> UsageError:
    # If a value can be of two types, the deepest error is the most precise one.
    first = max(error.errors(), key=lambda item: (item["type"] == "extra_forbidden", len(item["loc"])))
    place = (*inside, *first["loc"])
    where = f"{document.path}, line {document.line(place)}"
    key = ".".join(str(step) for step in place if not str(step)[:1].isupper() or step in inside) or "the file"
    if first["type"] == "extra_forbidden":
        known = _keys(schema, first["loc"][:-1])
        near = difflib.get_close_matches(str(place[-1])[:MAX_SHOWN], known, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
        return UsageError(f"{where}: unknown key `{key[:MAX_SHOWN]}`", hint=hint)
    return UsageError(f"{where}: {key[:MAX_SHOWN]}: {_problem(first)}", hint="docs/formats.md describes every key")


# pydantic's name of a problem -> our words for it.
PROBLEMS = {
    "missing": "is missing",
    "too_short": "is empty",
    "string_type": "is not a text; put it in quotes",
    "bool_type": "is not true or false",
    "bool_parsing": "is not true or false",
    "int_type": "is not a whole number",
    "int_parsing": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "float_parsing": "is not a number",
    "finite_number": "is not a finite number",
    "dict_type": "is not a mapping of keys to values",
    "model_type": "is not a mapping of keys to values",
    "list_type": "is not a list",
    "tuple_type": "is not a list",
    "literal_error": "is not one of {expected}",
    "enum": "is not one of {expected}",
    "greater_than_equal": "is less than {ge}",
    "greater_than": "is not above {gt}",
    "less_than_equal": "is above {le}",
    "less_than": "is not below {lt}",
}


def _problem(error: Mapping[str, Any]) -> str:
    """Describe one problem in our own words, with the value that was found."""
    message = str(error["msg"])[:500].removeprefix("Value error, ")
    if error["type"] in PROBLEMS:
        message = PROBLEMS[error["type"]].format(**error.get("ctx", {}))
    found = error.get("input")
    shown = isinstance(found, str | int | float) and error["type"] != "value_error"
    return f"`{str(found)[:MAX_SHOWN]}` {message}" if shown else message


def _keys(schema: type[BaseModel], place: Place) -> list[str]:
    current: Any = schema
    for step in place:
        fields = getattr(current, "model_fields", {})
        if step in fields:
            current = _model_in(fields[step].annotation) or current
    return [name for name, field in getattr(current, "model_fields", {}).items() if not field.exclude]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the schema that a field's type holds, inside any lists, maps and alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(inner) for inner in getattr(annotation, "__args__", ()))
    return next((model for model in found if model is not None), None)
