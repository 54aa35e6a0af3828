"""Decides which files of the sources a bundle does not carry, refuses some, and tells users. Reads no weights."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.choose import variants
from flexmerge_cli.checkpoint.contents import is_ignored
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.family import fused
from flexmerge_cli.family.family import Family

SHOWN = 8  # names in a message; the rest is counted
EXPECTED = {
    "training": "left by training, or hidden",
    "copies": "the same weights in another form",
    "ignored": "left out by --ignore",
}
UNEXPECTED = {
    "value_heads": "value heads beside an adapter",
    "index": "where an index and its shards differ",
    "other": "of no known kind",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Files of one kind of one task."""

    task: str
    kind: str
    """The kind, see contents.py."""
    files: tuple[str, ...]
    """Relative paths; for a folder that is left out whole, its path and a slash. For `index`: tensors, in words."""


def check(sources: Iterable[Checkpoint], access: Access, may_ignore: Collection[str] = ()) -> None:
    """Raise DataError that lists weights of unknown use, and UsageError for a pattern that matches no file.

    may_ignore: patterns that need not match one.
    """
    sources = list(sources)
    unclear = [f"{source.path / name}" for source in sources for name in source.left.get("unclear", ())]
    if unclear:
        last = [line.rpartition("/")[2] for line in unclear]
        found = next(iter(variants(last)), None)
        patterns = " ".join(f"--ignore {name}" for name in list(dict.fromkeys(last))[:SHOWN])
        raise DataError(
            "some files hold weights of an unknown kind:\n  " + "\n  ".join(unclear[:20]),
            hint=f"--variant {found}" if found else f"to leave them out: {patterns}",
        )
    for pattern in set(access.ignore) - set(may_ignore):
        ignored = (name for source in sources for name in source.left.get("ignored", ()))
        if not any(is_ignored(name, pattern) for name in ignored):
            raise UsageError(
                f"--ignore {pattern}: --tasks has no such subfolder, and no source has such a file",
                hint="check the name, or leave it out",
            )


def left_out(family: Family) -> list[LeftOut]:
    """List all that the bundle will not carry of the tasks' folders, by task and kind."""
    tasks = dict(zip(family.task_names, family.tasks)) | {each.name: each.checkpoint for each in family.kept}
    return [
        LeftOut(task=name, kind=kind, files=files)
        for name, checkpoint in sorted(tasks.items())
        for kind, files in checkpoint.left.items()
    ]


def notes(family: Family) -> list[str]:
    """Return one line per kind that no model misses."""
    return _lines(left_out(family), EXPECTED)


def warnings(family: Family) -> list[str]:
    """Return one line per kind that a model may miss or that differs in form, with what to do."""
    found = left_out(family)
    messages = _lines(found, UNEXPECTED) + fused.mixed(dict(zip(family.task_names, family.tasks)))
    code = [each for each in found if each.kind == "code"]
    if code:
        configs = {name: task.config for name, task in zip(family.task_names, family.tasks)}
        named = (
            " that `auto_map` of config.json names"
            if any("auto_map" in configs.get(each.task, {}) for each in code)
            else ""
        )
        messages.append(
            f"not carried, code{named}: {_names(code)}; models that need it will not load: add --with-code if you "
            "trust it"
        )
    return messages


def _lines(found: list[LeftOut], kinds: dict[str, str]) -> list[str]:
    of_kinds = {why: [each for each in found if each.kind == kind] for kind, why in kinds.items()}
    return [f"not carried, {why}: {_names(of_kind)}" for why, of_kind in of_kinds.items() if of_kind]


def _names(found: list[LeftOut]) -> str:
    """Say how many files of which tasks there are, and name the first ones."""
    count = sum(len(each.files) for each in found)
    names = list(dict.fromkeys(name for each in found for name in each.files))
    tasks = [each.task for each in found]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    of = f"`{tasks[0]}`" if len(tasks) == 1 else f"{len(tasks)} tasks"
    return f"{count} of {of} ({', '.join(names[:SHOWN])}{more})"
