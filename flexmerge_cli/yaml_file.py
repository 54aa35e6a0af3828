"""YAML written by hand, checked against a schema: errors with file, line, key and the nearest valid name.

Files may come from strangers: size and depth are bounded, aliases are refused (they expand without bound), and only
plain scalars, lists and maps are built.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from flexmerge_cli.errors import MachineError, SourceError, UsageError
from flexmerge_cli.text import holds_text

MAX_BYTES = 1 << 20
MAX_DEPTH = 20

Schema = TypeVar("Schema", bound=BaseModel)
Place = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A file's plain values, and the line of each."""

    path: Path
    value: Any
    lines: Mapping[Place, int]
    """Keys and indices from the top -> line, from 1."""

    def line(self, place: Place) -> int:
        """Of the key, or of what it would stand in."""
        return next((self.lines[place[:end]] for end in range(len(place), -1, -1) if place[:end] in self.lines), 1)

    def error(self, place: Place, message: str, *, hint: str, line_of: Place | None = None) -> UsageError:
        """What is wrong at a key; told with the line of another, where line_of is one."""
        key = ".".join(map(str, place)) or "the file"
        line = self.line(place if line_of is None else line_of)
        return UsageError(f"{self.path}, line {line}: {key}: {message}", hint=hint)

    def check(self, schema: type[Schema], place: Place = ()) -> Schema:
        """What stands at `place` as a `schema`. Raises UsageError with line, key and the nearest valid name."""
        value = self.value
        for step in place:
            value = value[step]
        try:
            return schema.model_validate(value)
        except ValidationError as error:
            raise _explained(self, error, schema, place) from None


def read_yaml(path: Path, schema: type[Schema], what: str) -> Schema:
    """The file as a `schema`. what: `recipe`, `spec`, … for messages. Raises SourceError, UsageError."""
    return read_document(path, what).check(schema)


def read_document(path: Path, what: str) -> Document:
    """Its plain values, bounded in size and depth, not yet checked. Raises SourceError, UsageError."""
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError:  # a path that no file can have
        size = None
    if size is None:
        raise SourceError(f"no {what} at {path}", hint="check the path")
    if size > MAX_BYTES:
        raise UsageError(f"{path} is larger than {MAX_BYTES} bytes", hint=f"is it a {what}?")
    try:
        text = path.read_text(encoding="utf-8")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise UsageError(f"{path}, line {line}: an alias (`*{event.anchor}`)", hint="write the value out")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[Place, int] = {}
        _lines(path, node, (), lines)
        value = yaml.safe_load(text)
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text", hint=f"is it a {what}?") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{where}: {getattr(error, 'problem', None) or error}", hint="mend the YAML") from None
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror}", hint="check permissions") from None
    except (RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:
        # As PyYAML has it where a value is not of the type that its tag says: `!!bool maybe`, `!!timestamp soon`.
        raise UsageError(f"{path} cannot be read: {str(error)[:100]}", hint=f"is it a {what}?") from None
    if not holds_text(value):
        raise UsageError(f"{path} holds text that no file can hold", hint=f"is it a {what}?")
    return Document(path=path, value=value, lines=lines)


def _lines(path: Path, node: Any, place: Place, lines: dict[Place, int]) -> None:
    """Line of every key and item."""
    if node is None:
        return
    lines.setdefault(place, node.start_mark.line + 1)
    if len(place) > MAX_DEPTH:
        raise UsageError(f"{path}, line {node.start_mark.line + 1}: nested too deeply", hint="flatten it")
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{path}, line {line}: a key that is no word", hint="mend the YAML")
            if key.value in seen:
                raise UsageError(f"{path}, line {line}: `{key.value}` stands twice", hint="remove one")
            seen.add(key.value)
            lines[(*place, key.value)] = line
            _lines(path, value, (*place, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _lines(path, value, (*place, index), lines)


def _explained(document: Document, error: ValidationError, schema: type[BaseModel], inside: Place) -> UsageError:
    # The deepest error is the most precise one where a value could be of two types.
    first = max(error.errors(), key=lambda item: (item["type"] == "extra_forbidden", len(item["loc"])))
    place = (*inside, *first["loc"])
    where = f"{document.path}, line {document.line(place)}"
    key = ".".join(str(step) for step in place if not str(step)[:1].isupper() or step in inside) or "the file"
    if first["type"] == "extra_forbidden":
        known = _keys(schema, first["loc"][:-1])
        near = difflib.get_close_matches(str(place[-1]), known, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
        return UsageError(f"{where}: unknown key `{key}`", hint=hint)
    return UsageError(f"{where}: {key}: {first['msg']}", hint="see the README")


def _keys(schema: type[BaseModel], place: Place) -> list[str]:
    current: Any = schema
    for step in place:
        fields = getattr(current, "model_fields", {})
        if step in fields:
            current = _model_in(fields[step].annotation) or current
    return [name for name, field in getattr(current, "model_fields", {}).items() if not field.exclude]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The schema that a field's type holds, in whatever lists, maps and alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(inner) for inner in getattr(annotation, "__args__", ()))
    return next((model for model in found if model is not None), None)
