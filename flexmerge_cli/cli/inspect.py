"""`flexmerge inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from flexmerge_cli.cli import options as o


def inspect(
    source: o.Inspected,
    block: Annotated[
        str | None, o.option("--block", "NAME", "Show the similarities of the tasks in this block of a plan.")
    ] = None,
    verify: Annotated[bool, o.option("--verify", "", "Check every byte of a bundle against the manifest.")] = False,
    decode: Annotated[bool, o.option("--decode", "", "With --verify: check every decoded tensor as well.")] = False,
    spectrum: Annotated[
        Path | None,
        o.option("--spectrum", "PLAN", "Read the weights of a bundle and its plan: how evenly frequencies are filled."),
    ] = None,
    relocate: o.Relocate = None,
    html: o.Html = None,
    offline: o.Offline = False,
    variant: o.Variant = None,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Show what a checkpoint, a plan or a bundle holds.

    \b
    Examples:
    flexmerge inspect bundle/
    flexmerge inspect plan.json --html report.html
    flexmerge inspect bundle/ --spectrum plan.json
    """
    from flexmerge_cli.cli import output
    from flexmerge_cli.report.inspect import Asked, check, look

    access = o.access_of(offline=offline, quiet=quiet, variant=variant)
    asked = Asked(
        source=source,
        block=block,
        verify=verify,
        decode=decode,
        spectrum=spectrum,
        relocate=o.relocations(relocate),
        html=html,
        every=verbose,
        access=access,
    )
    kind = check(asked)
    if html is not None:
        from flexmerge_cli.report.html import is_page
        from flexmerge_cli.writing import check_file

        check_file(html, force=force, replaceable=is_page, what="a page")
    with output.progress(quiet=quiet or as_json, verbose=verbose) as on_progress:
        report = look(asked, kind, on_progress=on_progress)
    written = [html] if html is not None else []
    output.emit(report.value, as_json=as_json, quiet=quiet, show=report.show, written=written)
    if html is not None:
        output.note(f"wrote {html}", quiet=quiet)
    if report.error is not None:
        if not as_json:
            raise report.error
        output.tell(report.error)  # the JSON document contains it already
        raise typer.Exit(report.error.exit_code)
