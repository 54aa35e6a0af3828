"""Parses the YAML text of rules files into compiled rules. Knows nothing about models; `blocks.py` applies the rules.

words   {set: [word, …]}, MAY be left out. A pattern refers to a set as `<set>`
rules   [rule, …]; the first that matches a name decides. A rule is a pattern, or
        {match: pattern or [pattern, …], as: word}; `as` MAY be left out
split   [{match: pattern or [pattern, …], parts: number, dim: 0 or 1}, …], MAY be left out: tensors that are split into
        this many equal parts along an axis, 0 unless `dim` says otherwise. Then `rules` MAY also be left out: the
        default ones apply

A pattern consists of segments with dots between them. It matches a run of whole segments anywhere in a name, the
leftmost; what comes before (`model.`, `bert.`) and after (`q_proj.weight`) is free. A segment is a word, `<set>`, `N`
(a number, or a word that ends in `_` and a number, like `encoder_layer_3`), several of these with `|` between them, or
`*` (any one).

The block is the path from the start of the name to the end of the match. With `as` it is the path to the pattern's last
`N`, or to the start of the match, and then that word: `N.fc1|fc2` as `mlp` is `layers.3.mlp`.

Words also give the order of the blocks: see `blocks.py`. A word counts where it first occurs in the file, a set in a
pattern as its words.

Files may come from strangers: other keys, aliases and anything over 64 KiB are refused, nothing is built from a tag,
and every fault is a UsageError with file and line.
"""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import yaml

from flexmerge_cli.errors import MachineError, SourceError, UsageError
from flexmerge_cli.family.split import MAX_PARTS

# Bounds the time that PyYAML takes: the worst 64 KiB, one-letter words, take 2 s. rules.yaml has 4 KiB.
MAX_BYTES = 64 << 10
# Bound the expressions, and the time that a name takes: a set counts at each use. rules.yaml has about 50.
MAX_CHOICES = 20_000
MAX_PATTERNS = 1_000
# `rules`, rule, `match`, pattern: 4 levels. PyYAML recurses.
MAX_DEPTH = 8

START = r"(?:\A|(?<=\.))"
NUMBERED = r"(?:[^.]*_)?[0-9]+"
SPECIAL = set(".|<>*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One pattern, and the name that its matches get."""

    pattern: re.Pattern[str]
    """Its group `kept` is the part of the match that stays in the block's name."""
    rename: str | None
    """The word that follows `kept`; None for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRule:
    """A rule that splits the tensors whose names match."""

    pattern: re.Pattern[str]
    parts: int
    """The number of parts, at least 2."""
    dim: Literal[0, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """A rules file, checked and compiled."""

    rules: tuple[Rule, ...]
    """Rules in file order. A rule with several patterns appears once per pattern."""
    rank: Mapping[str, int]
    """Maps each word to its position in the file."""
    any_rule: re.Pattern[str]
    """Matches the names that some rule matches, so that a name without a rule costs one search."""
    splits: tuple[SplitRule, ...] = ()
    """The split rules in file order."""

    def block_of(self, name: str) -> str | None:
        """Return the block of a tensor's name by the first rule that matches; None if none does."""
        if not self.any_rule.search(name):
            return None
        for rule in self.rules:
            if found := rule.pattern.search(name):
                kept = name[: found.end("kept")]
                if rule.rename is None:
                    return kept
                # If nothing of the match stays, the text before it ends with a dot or is empty.
                return kept + ("" if found.end("kept") == found.start() else ".") + rule.rename
        return None


def read_rules(path: Path, loader: type = yaml.SafeLoader) -> Rules:
    """Read a rules file. Raises SourceError if it is missing, MachineError if unreadable, and UsageError if
    malformed. loader: PyYAML's."""
    if "\0" in str(path):
        raise UsageError(f"{str(path)!r} cannot be the path of a rules file")
    try:
        if not path.exists():
            raise SourceError(f"no rules file at `{path}`", hint="`--blocks component` needs no file")
        if not path.is_file():  # a pipe would block forever, and a device never end
            raise UsageError(f"`{path}` is not a file", hint="give a rules file, such as rules.yaml")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise MachineError(f"cannot read the rules file `{path}`: {error}") from error
    if len(raw) > MAX_BYTES:
        raise UsageError(f"the rules file `{path}` has more than {MAX_BYTES} bytes", hint="is it a rules file?")
    try:
        return parse_rules(raw.decode("utf-8-sig"), str(path), loader)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(f"not UTF-8 at byte {error.start}\n  {path}, line {line}", hint="save it as UTF-8") from None


def parse_rules(text: str, where: str, loader: type = yaml.SafeLoader) -> Rules:
    """Compile the text of a rules file; `where` is its name in errors."""
    return _Parser(where, loader).parse(text)


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return a hint that names the valid word most similar to `word`, or all valid words."""
    valid = list(valid)
    # difflib takes time in the product of the lengths.
    close = difflib.get_close_matches(word[:64], [v for v in valid if len(v) <= 64], n=1)
    return f"did you mean `{close[0]}`?" if close else "valid: " + (", ".join(f"`{v}`" for v in valid) or "none")


class _Parser:
    """Turns the node tree of one file into Rules: nodes know their lines, and are never made into objects."""

    def __init__(self, where: str, loader: type) -> None:
        self.where, self.loader = where, loader
        self.words: dict[str, tuple[str, ...]] = {}
        self.rank: dict[str, int] = {}
        self.num_choices = self.num_patterns = 0

    def parse(self, text: str) -> Rules:
        top = self.mapping(self.compose(text), "a rules file", ("words", "rules", "split"))
        # Sets come first, since a pattern may stand above them. The order of words is that of the file.
        if "words" in top:
            sets = self.mapping(top["words"], "`words`")
            self.words = {key: tuple(map(self.word, self.items(node, f"<{key}>"))) for key, node in sets.items()}
        if "rules" not in top and "split" not in top:
            self.fault(1, "no `rules`", "list at least one pattern under `rules:`")
        rules: list[Rule] = []
        for key, node in top.items():
            if key == "words":
                self.place(itertools.chain.from_iterable(self.words.values()))
            elif key == "rules":
                rules += [rule for item in self.items(node, "`rules`") for rule in self.rule(item)]
        every = "|".join(
            dict.fromkeys(rule.pattern.pattern.removeprefix(START).replace("?P<kept>", "?:") for rule in rules)
        )
        splits = (
            [rule for item in self.items(top["split"], "`split`") for rule in self.split(item)]
            if "split" in top
            else []
        )
        return Rules(
            rules=tuple(rules), rank=self.rank, any_rule=re.compile(f"{START}(?:{every})"), splits=tuple(splits)
        )

    def compose(self, text: str) -> yaml.Node:
        depth, line = 0, 1
        try:
            for event in yaml.parse(text, Loader=self.loader):
                line = event.start_mark.line + 1 if event.start_mark else line
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > MAX_DEPTH:
                    self.fault(line, "too many levels", "no rules file has more than four")
                if isinstance(event, yaml.AliasEvent):
                    # A few aliases of aliases can stand for more nodes than fit in memory.
                    self.fault(line, "an alias", "quote a pattern that starts with *; for a list, use a set of `words`")
            node: yaml.Node | None = yaml.compose(text, Loader=self.loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            is_alias = error.context == "while scanning an alias"
            hint = "quote a pattern that starts with *" if is_alias else None
            self.fault(mark.line + 1 if mark else 1, f"not valid YAML: {error.problem or error.context}", hint)
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two: "\\UFFFFFFFF"
            self.fault(line, f"not valid YAML: {error}", None)
        if node is None:
            self.fault(1, "the file is empty", "list at least one pattern under `rules:`")
        return node

    def rule(self, node: yaml.Node) -> list[Rule]:
        """Parse a rule: `pattern`, or {match, as}."""
        if isinstance(node, yaml.ScalarNode):
            return [self.pattern(node, None)]
        fields = self.mapping(node, "a rule that is not a pattern", ("match", "as"))
        if "match" not in fields:
            self.fault(node, "a rule without `match`", "write `match: layers.N.self_attn`")
        match = fields["match"]
        rename = self.word(fields["as"]) if "as" in fields else None
        nodes = [match] if isinstance(match, yaml.ScalarNode) else self.items(match, "`match`")
        rules = [self.pattern(item, rename) for item in nodes]
        self.place([rename] if rename else [])
        return rules

    def split(self, node: yaml.Node) -> list[SplitRule]:
        """Parse an entry of `split`."""
        fields = self.mapping(node, "an entry of `split`", ("match", "parts", "dim"))
        for key in ("match", "parts"):
            if key not in fields:
                self.fault(node, f"an entry of `split` without `{key}`", "write {match: N.self_attn.q_proj, parts: 12}")
        match = fields["match"]
        nodes = [match] if isinstance(match, yaml.ScalarNode) else self.items(match, "`match`")
        parts = self.number(fields["parts"], "`parts`", range(2, MAX_PARTS + 1))
        dim = self.number(fields["dim"], "`dim`", range(2)) if "dim" in fields else 0
        return [SplitRule(pattern=self.pattern(item, None).pattern, parts=parts, dim=1 if dim else 0) for item in nodes]

    def number(self, node: yaml.Node, what: str, valid: range) -> int:
        text = self.scalar(node, what)
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) not in valid:
            self.fault(node, f"{what} is `{text}`", f"give a whole number from {valid[0]} to {valid[-1]}")
        return int(text)

    def pattern(self, node: yaml.Node, rename: str | None) -> Rule:
        text = self.scalar(node, "a pattern")
        self.num_patterns += 1
        if self.num_patterns > MAX_PATTERNS:
            self.fault(node, f"more than {MAX_PATTERNS} patterns", "write several as one, with N, a|b or a set")
        segments = [self.segment(node, segment) for segment in text.split(".")]
        kept = len(segments)
        if rename is not None:
            kept = max((i + 1 for i, segment in enumerate(segments) if segment == NUMBERED), default=0)
        dot = re.escape(".")
        head, tail = dot.join(segments[:kept]), dot.join(segments[kept:])
        between = dot if head and tail else ""
        expression = rf"{START}(?P<kept>{head}){between}{tail}(?=\.|\Z)"
        return Rule(pattern=re.compile(expression), rename=rename)

    def segment(self, node: yaml.Node, text: str) -> str:
        """Return the regular expression of one segment. Registers the order of its words."""
        self.num_choices += 1
        if text == "*":
            return "[^.]*"
        choices: list[str] = []
        for choice in text.split("|"):
            if choice == "N":
                choices.append(NUMBERED)
            elif choice.startswith("<") and choice.endswith(">"):
                if choice[1:-1] not in self.words:
                    self.fault(node, f"no set {choice} in `words`", nearest(choice[1:-1], self.words))
                self.place(self.words[choice[1:-1]])
                choices += map(re.escape, self.words[choice[1:-1]])
            elif not choice or SPECIAL & set(choice):
                self.fault(node, f"`{text}` in a pattern", "a segment is a word, <set>, N, a|b, or * alone")
            else:
                self.place([choice])
                choices.append(re.escape(choice))
        self.num_choices += len(choices)
        if self.num_choices > MAX_CHOICES:
            self.fault(node, f"more than {MAX_CHOICES} words in patterns", "a set counts at each use")
        return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"

    def place(self, words: Iterable[str]) -> None:
        for word in words:
            self.rank.setdefault(word, len(self.rank))

    def word(self, node: yaml.Node) -> str:
        text = self.scalar(node, "a word")
        if not text.strip() or not text.isprintable() or SPECIAL & set(text) or text == "N":
            self.fault(node, f"`{text}` as a word", "a word is one whole segment of a name, such as self_attn")
        return text

    def scalar(self, node: yaml.Node, what: str) -> str:
        """Return a scalar as written, so that `no`, `on` and `1` are words too."""
        if not isinstance(node, yaml.ScalarNode):
            self.fault(node, f"{what} must be text, not {_kind(node)}", None)
        return str(node.value)

    def items(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.fault(
                node, f"{what} must be a list with something in it", "write [a, b], or one item per line, after `- `"
            )
        return list(node.value)

    def mapping(self, node: yaml.Node, what: str, valid: tuple[str, ...] | None = None) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            self.fault(node, f"{what} must be a mapping, not {_kind(node)}", None)
        fields: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = self.scalar(key_node, "a key")
            if key in fields:
                self.fault(key_node, f"`{key}` twice in {what}", None)
            if valid is not None and key not in valid:
                self.fault(key_node, f"unknown key `{key}` in {what}", nearest(key, valid))
            fields[key] = value
        return fields

    def fault(self, at: yaml.Node | int, message: str, hint: str | None) -> NoReturn:
        line = at if isinstance(at, int) else at.start_mark.line + 1
        raise UsageError(f"{_plain(message)}\n  {self.where}, line {line}", hint=hint and _plain(hint))


def _kind(node: yaml.Node) -> str:
    return {yaml.ScalarNode: "text", yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}[type(node)]


def _plain(text: str) -> str:
    """Make text of an untrusted file fit for a message: without control characters, and shortened."""
    text = text if len(text) <= 300 else text[:300] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
