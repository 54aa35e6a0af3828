"""`flexmerge inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from flexmerge_cli.cli.options import ForceOption, JsonOption, OfflineOption, QuietOption, VariantOption


def inspect(
    source: Annotated[str, typer.Argument(help="A checkpoint (path or hf://...), a plan.json, or a bundle.")],
    block: Annotated[
        str | None, typer.Option("--block", help="For a plan: show the similarities of the tasks in this block.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="For a bundle: check every byte against the manifest.")
    ] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help="With --verify: check every decoded tensor as well.")
    ] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write an HTML report on a plan or a bundle.")] = None,
    offline: OfflineOption = False,
    variant: VariantOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show all rows of long tables.")] = False,
) -> None:
    """Show what a checkpoint, a plan or a bundle holds.

    \b
    Examples:
    flexmerge inspect bundle/
    flexmerge inspect plan.json --html report.html
    """
    from flexmerge_cli.cli import options
    from flexmerge_cli.report.inspect import Asked, check, look

    access = options.access_of(offline=offline, quiet=quiet, variant=variant)
    asked = Asked(source=source, block=block, verify=verify, decode=decode, html=html, every=verbose, access=access)
    kind = check(asked)
    if html is not None:
        from flexmerge_cli.report.html import is_page
        from flexmerge_cli.writing import check_file

        check_file(html, force=force, replaceable=is_page, what="a page")
    with options.progress(quiet=quiet or as_json) as on_progress:
        report = look(asked, kind, on_progress=on_progress)
    options.emit(report.value, as_json=as_json, show=report.show, written=[html] if html is not None else [])
    if html is not None:
        options.note(f"wrote {html}", quiet=quiet)
    if report.error is not None:
        if not as_json:
            raise report.error
        options.tell(report.error)  # the JSON document contains it already
        raise typer.Exit(report.error.exit_code)
