"""`flexmerge inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from flexmerge_cli.cli.options import ForceOption, JsonOption, OfflineOption, QuietOption, VariantOption


def inspect(
    source: Annotated[str, typer.Argument(help="A checkpoint (path or hf://...), a plan.json, or a bundle.")],
    block: Annotated[
        str | None, typer.Option("--block", help="Of a plan: how alike the tasks are in one block.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Of a bundle: compare every byte with its manifest.")
    ] = False,
    decode: Annotated[bool, typer.Option("--decode", help="With --verify: every decoded tensor, too.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write one page on a plan or a bundle.")] = None,
    offline: OfflineOption = False,
    variant: VariantOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="All rows of long tables.")] = False,
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
    options.emit(report.value, as_json=as_json, show=report.show)
    if html is not None:
        options.note(f"wrote {html}", quiet=quiet)
    if report.error is not None:
        if not as_json:
            raise report.error
        options.tell(report.error)  # the document has it already
        raise typer.Exit(report.error.exit_code)
