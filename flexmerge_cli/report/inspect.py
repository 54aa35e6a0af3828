"""Recognises what `inspect` was given, and shows it: a value for --json, and the same as tables. Needs no torch.

Checkpoints, plans and bundles are recognised by their content, never by their name. Only `.bin` files need torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.locate import holds_bundle, locate
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, is_bundle, standing
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.checkpoint import find_weights, open_checkpoint
from flexmerge_cli.checkpoint.choose import WEIGHT_SUFFIXES
from flexmerge_cli.checkpoint.place import is_hub, is_remote
from flexmerge_cli.errors import FlexmergeError, UsageError
from flexmerge_cli.regular_file import check_kind, open_file
from flexmerge_cli.text import expanded
from flexmerge_cli.writing import write_file

OnProgress = Callable[[str, int, int], None]


class Kind(StrEnum):
    CHECKPOINT = "checkpoint"
    PLAN = "plan"
    BUNDLE = "bundle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A source and what to show of it."""

    source: str
    """The source as the user wrote it."""
    block: str | None = None
    verify: bool = False
    decode: bool = False
    """Check also, with `verify`, the digests of decoded tensors."""
    html: Path | None = None
    every: bool = False
    """Show all rows of long tables."""
    access: Access = ONLINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of an inspection."""

    value: dict[str, Any]
    """The value for --json."""
    show: Callable[[Any], None]
    """Prints the value as text."""
    error: FlexmergeError | None = None
    """The error of a bundle that was inspected and is damaged."""


def recognise(source: str, access: Access = ONLINE) -> Kind:
    """Recognise the kind of a source; a missing one counts as a checkpoint. Raises UsageError for other files."""
    path = standing(expanded(source))
    if is_remote(source):
        return Kind.BUNDLE if is_hub(source) and holds_bundle(source, access) else Kind.CHECKPOINT
    if not path.exists():
        return Kind.CHECKPOINT  # opening it reports what is wrong
    check_kind(path)
    if path.is_dir():
        # This holds also if the manifest is missing or damaged, so that the problem is reported.
        if (path / "weights").is_dir() and any((path / name).exists() for name in (MANIFEST_NAME, "tasks", "coded")):
            return Kind.BUNDLE
        if is_bundle(path):
            return Kind.BUNDLE
        if find_weights(path) is None:
            inside = sorted(str(child) for child in path.iterdir() if child.is_dir() and find_weights(child))
            if inside:
                raise UsageError(f"{source} holds {len(inside)} checkpoints", hint=f"flexmerge inspect {inside[0]}")
        return Kind.CHECKPOINT
    if path.suffix in WEIGHT_SUFFIXES:
        return Kind.CHECKPOINT
    if path.name == MANIFEST_NAME or path.name.endswith(".index.json"):
        raise UsageError(
            f"{source} is a file of a checkpoint or bundle folder", hint=f"flexmerge inspect {path.parent}"
        )
    if path.suffix in (".yaml", ".yml"):
        raise UsageError(
            f"{source} may be a recipe, but `inspect` shows plans", hint=f"flexmerge plan {source} -o plan.json"
        )
    with open_file(path) as file:
        if file.read(64).lstrip()[:1] != b"{":
            raise UsageError(f"{source} is not a checkpoint, plan or bundle", hint="give a folder or a plan.json")
    return Kind.PLAN


def check(asked: Asked) -> Kind:
    """Check the kind of source and whether the request fits it, before anything is read. Raises UsageError."""
    if asked.decode and not asked.verify:
        raise UsageError("--decode requires --verify", hint="--verify --decode")
    kind = recognise(asked.source, asked.access)
    what = f"{asked.source} is a {kind}"
    if asked.verify and kind is not Kind.BUNDLE:
        raise UsageError(f"--verify checks a bundle against its manifest, but {what}", hint="leave out --verify")
    if asked.block is not None and kind is not Kind.PLAN:
        raise UsageError(f"--block shows a block of a plan, but {what}", hint="leave out --block")
    if asked.html is not None and kind is Kind.CHECKPOINT:
        raise UsageError(f"--html shows a plan or a bundle, but {what}", hint="flexmerge plan, then inspect the plan")
    if asked.html is not None and asked.verify:
        raise UsageError("--html and --verify cannot be combined", hint="run one after the other")
    if asked.html is not None:
        check_apart(asked.html, [asked.source])
    return kind


def look(asked: Asked, kind: Kind, *, on_progress: OnProgress) -> Report:
    """Read the source, and write the page if requested. Raises whatever reading raises."""
    path = expanded(asked.source)
    if kind is Kind.CHECKPOINT:
        from flexmerge_cli.report.inspect_checkpoint import checkpoint_value, show_checkpoint

        return Report(
            value=checkpoint_value(open_checkpoint(asked.source, access=asked.access, side_files=False)),
            show=lambda value: show_checkpoint(value, every=asked.every),
        )
    if asked.verify:
        return _verified(locate(asked.source, asked.access, on_progress=on_progress).path, asked, on_progress)
    page = None
    if kind is Kind.PLAN:
        from flexmerge_cli.report.inspect_plan import plan_facts, plan_value
        from flexmerge_cli.report.inspect_plan_tables import show_plan

        plan = plan_facts(path, asked.block)
        if asked.html is not None:
            from flexmerge_cli.report.html_plan import plan_page

            page = plan_page(plan)
        report = Report(value=plan_value(plan), show=lambda value: show_plan(plan, value, every=asked.every))
    else:
        from flexmerge_cli.report.inspect_bundle import bundle_facts, bundle_value, show_bundle

        bundle = bundle_facts(locate(asked.source, asked.access, headers_only=True))
        if asked.html is not None:
            from flexmerge_cli.report.html_bundle import bundle_page

            page = bundle_page(bundle)
        report = Report(value=bundle_value(bundle), show=lambda value: show_bundle(bundle, value, every=asked.every))
    if asked.html is not None and page is not None:
        write_file(asked.html, page)
        report.value["html"] = str(asked.html)
    return report


def write_page(source: Path, html: Path, kind: Kind) -> None:
    """Write the page of a plan or a bundle."""
    look(Asked(source=str(source), html=html), kind, on_progress=lambda *_step: None)


def _verified(path: Path, asked: Asked, on_progress: OnProgress) -> Report:
    from flexmerge_cli.bundle.read import Bundle
    from flexmerge_cli.report.inspect_verify import failure, show_verification, verification

    bundle = Bundle.look(path)
    total = sum(file.bytes for file in bundle.manifest.files.values())
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress("verify", done, total)

    value = verification(bundle, decode=asked.decode, on_bytes=on_bytes)
    error = failure(value)
    if error is not None:
        value["error"] = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    return Report(value=value, show=show_verification, error=error)
