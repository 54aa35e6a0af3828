"""Recognises what `inspect` was given, and shows it: a value for --json, and the same as tables. Needs no torch.

Checkpoints, plans and bundles are recognised by their content, never by their name. Only `.bin` files need torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.kind import SourceKind, recognise
from flexmerge_cli.bundle.locate import locate
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.errors import FlexmergeError, UsageError
from flexmerge_cli.text import expanded
from flexmerge_cli.writing import write_file

if TYPE_CHECKING:
    from flexmerge_cli.bundle.read import Bundle

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A source and what to show of it."""

    source: str
    """The source as the user wrote it."""
    block: str | None = None
    verify: bool = False
    decode: bool = False
    """Check also, with `verify`, the digests of decoded tensors."""
    spectrum: Path | None = None
    """The plan of a bundle whose frequencies to measure."""
    relocate: Mapping[str, str] = field(default_factory=dict)
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


def check(asked: Asked) -> SourceKind:
    """Check the kind of source and whether the request fits it, before anything is read. Raises UsageError."""
    if asked.decode and not asked.verify:
        raise UsageError("--decode requires --verify", hint="--verify --decode")
    kind = recognise(asked.source, asked.access)
    what = f"{asked.source} is a {kind}"
    if asked.verify and kind is not SourceKind.BUNDLE:
        raise UsageError(f"--verify checks a bundle against its manifest, but {what}", hint="leave out --verify")
    if asked.block is not None and kind is not SourceKind.PLAN:
        raise UsageError(f"--block shows a block of a plan, but {what}", hint="leave out --block")
    if asked.spectrum is not None and kind is not SourceKind.BUNDLE:
        raise UsageError(
            f"--spectrum compares a bundle with its plan's models, but {what}", hint="leave out --spectrum"
        )
    if asked.spectrum is not None and asked.verify:
        raise UsageError("--spectrum and --verify cannot be combined", hint="run one after the other")
    if asked.relocate and asked.spectrum is None:
        raise UsageError("--relocate has no effect without --spectrum", hint="leave out --relocate")
    if asked.html is not None and kind is SourceKind.CHECKPOINT:
        raise UsageError(f"--html shows a plan or a bundle, but {what}", hint="flexmerge plan, then inspect the plan")
    if asked.html is not None and asked.verify:
        raise UsageError("--html and --verify cannot be combined", hint="run one after the other")
    if asked.html is not None:
        check_apart(asked.html, [asked.source])
    return kind


def look(asked: Asked, kind: SourceKind, *, on_progress: OnProgress) -> Report:
    """Read the source, and write the page if requested. Raises whatever reading raises."""
    path = expanded(asked.source)
    if kind is SourceKind.CHECKPOINT:
        from flexmerge_cli.report.inspect_checkpoint import checkpoint_value, show_checkpoint

        return Report(
            value=checkpoint_value(open_checkpoint(asked.source, access=asked.access, side_files=False)),
            show=lambda value: show_checkpoint(value, every=asked.every),
        )
    if asked.verify:
        return _verified(locate(asked.source, asked.access, on_progress=on_progress).path, asked, on_progress)
    page = None
    if kind is SourceKind.PLAN:
        from flexmerge_cli.report.inspect_plan import plan_facts, plan_value
        from flexmerge_cli.report.inspect_plan_tables import show_plan

        plan = plan_facts(path, asked.block)
        if asked.html is not None:
            from flexmerge_cli.report.html_plan import plan_page

            page = plan_page(plan)
        report = Report(value=plan_value(plan), show=lambda value: show_plan(plan, value, every=asked.every))
    else:
        from flexmerge_cli.report.inspect_bundle import bundle_facts, bundle_value, show_bundle

        headers_only = asked.spectrum is None
        bundle = bundle_facts(locate(asked.source, asked.access, headers_only=headers_only, on_progress=on_progress))
        value = bundle_value(bundle) | _spectrum(bundle.bundle, asked, on_progress)

        def show(value: dict[str, Any]) -> None:
            show_bundle(bundle, value, every=asked.every)
            if "spectrum" in value:
                from flexmerge_cli.report.inspect_spectrum import show_spectrum

                show_spectrum(value["spectrum"], every=asked.every)

        if asked.html is not None:
            from flexmerge_cli.report.html_bundle import bundle_page

            page = bundle_page(bundle, value.get("spectrum"))
        report = Report(value=value, show=show)
    if asked.html is not None and page is not None:
        write_file(asked.html, page)
        report.value["html"] = str(asked.html)
    return report


def _spectrum(bundle: "Bundle", asked: Asked, on_progress: OnProgress) -> dict[str, Any]:
    """Return the part of the value that `--spectrum` adds."""
    if asked.spectrum is None:
        return {}
    from flexmerge_cli.evaluation.spectrum import spectrum
    from flexmerge_cli.planning.make import load_plan
    from flexmerge_cli.report.inspect_spectrum import spectrum_value

    found = spectrum(
        bundle,
        load_plan(asked.spectrum),
        asked.spectrum.absolute().parent,
        relocate=asked.relocate,
        access=asked.access,
        on_progress=on_progress,
    )
    return {"spectrum": spectrum_value(found)}


def write_page(source: Path, html: Path, kind: SourceKind) -> None:
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
