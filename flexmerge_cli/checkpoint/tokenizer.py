"""Reads from a checkpoint's tokenizer files which row of an embedding is which token.

Reads `tokenizer.json`; otherwise `vocab.json` or `vocab.txt`, with what `added_tokens.json` and `tokenizer_config.json`
add. Malformed files, and those of another format (sentencepiece), count as missing and are reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmerge_cli.errors import FlexmergeError
from flexmerge_cli.json_file import parse_json
from flexmerge_cli.regular_file import read_file

# The largest in use, with 256,000 tokens and their merges, have 34 MB.
MAX_BYTES = 64 << 20  # Gemma's has 34 MB
MAX_ROW = 1 << 31
FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json", "tokenizer_config.json")
OTHER_FORMATS = (".model", ".spm", ".tiktoken")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a model's tokenizer says about the rows."""

    rows: Mapping[str, int] | None
    """The row of each token. None if nothing could be read."""
    why: str = ""
    """Why nothing could be read."""


class _Unsound(Exception):
    """A malformed file. The text says what is wrong."""


def read_tokens(side_files: Mapping[str, Path]) -> Tokens:
    """Read the tokenizer. side_files: name -> path, of one checkpoint."""
    try:
        if "tokenizer.json" in side_files:
            return Tokens(rows=_tokenizer_json(_json(side_files["tokenizer.json"])))
        if "vocab.json" in side_files:
            rows = _rows(_json(side_files["vocab.json"]), "vocab.json")
        elif "vocab.txt" in side_files:
            rows = {token: row for row, token in enumerate(_lines(side_files["vocab.txt"]))}
        else:
            other = [name for name in side_files if name.endswith(OTHER_FORMATS)]
            return Tokens(
                rows=None, why=f"{other[0]} has a format that flexmerge does not read" if other else "no tokenizer"
            )
        if "added_tokens.json" in side_files:
            rows |= _rows(_json(side_files["added_tokens.json"]), "added_tokens.json")
        if "tokenizer_config.json" in side_files:
            rows |= _added_by_config(_json(side_files["tokenizer_config.json"]))
        return Tokens(rows=rows)
    except _Unsound as error:
        return Tokens(rows=None, why=str(error))


def is_one_tokenizer(left: Mapping[str, Path], right: Mapping[str, Path]) -> bool:
    """Return whether two models have the same files, byte by byte, as most fine-tunes share those of their base."""
    return all(
        (name in left) == (name in right) and (name not in left or _same_bytes(left[name], right[name]))
        for name in FILES
    )


def _same_bytes(left: Path, right: Path) -> bool:
    return left.stat().st_size == right.stat().st_size and left.read_bytes() == right.read_bytes()


def _tokenizer_json(value: Mapping[str, Any]) -> dict[str, int]:
    """Read `model.vocab`, which is token -> row or a list of [token, score] (Unigram), and `added_tokens`, {content,
    id}."""
    model = value.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        pieces = [piece[0] if isinstance(piece, list) and piece else piece for piece in vocabulary]
        rows = _rows({piece: row for row, piece in enumerate(pieces)} if _are_texts(pieces) else None, "tokenizer.json")
    else:
        rows = _rows(vocabulary, "tokenizer.json")
    added = value.get("added_tokens") or []
    if not isinstance(added, list) or not all(map(_is_added, added)):
        raise _Unsound("tokenizer.json has no sound `added_tokens`")
    return rows | _rows({token["content"]: token.get("id") for token in added}, "tokenizer.json")


def _added_by_config(value: Mapping[str, Any]) -> dict[str, int]:
    """Read `added_tokens_decoder`, row -> {content}, where rows are text."""
    added = value.get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(
        row.isascii() and row.isdigit() and len(row) <= 10 and _is_added(token) for row, token in added.items()
    ):
        raise _Unsound("tokenizer_config.json has no sound `added_tokens_decoder`")
    return _rows({token["content"]: int(row) for row, token in added.items()}, "tokenizer_config.json")


def _is_added(token: Any) -> bool:
    return isinstance(token, dict) and isinstance(token.get("content"), str)


def _rows(value: Any, file: str) -> dict[str, int]:
    if not isinstance(value, dict) or not _are_texts(value):
        raise _Unsound(f"{file} has no sound vocabulary")
    if not all(type(row) is int and 0 <= row < MAX_ROW for row in value.values()):
        raise _Unsound(f"{file} has a token whose id is not a row")
    return value


def _are_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(_bytes(path))
    except ValueError:
        raise _Unsound(f"{path.name} is not valid JSON") from None
    if not isinstance(value, dict):
        raise _Unsound(f"{path.name} is not a JSON object")
    return value


def _lines(path: Path) -> list[str]:
    try:
        text = _bytes(path).decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise _Unsound(f"{path.name} is not UTF-8") from None
    # splitlines would also split at characters that are tokens: U+0085, U+2028.
    return text.removesuffix("\n").split("\n") if text else []


def _bytes(path: Path) -> bytes:
    try:
        return read_file(path, MAX_BYTES, "a tokenizer")
    except FlexmergeError as error:
        raise _Unsound(error.message) from None
