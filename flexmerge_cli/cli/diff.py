"""`flexmerge diff`."""

from typing import Annotated

import typer

from flexmerge_cli.cli import options as o


def diff(
    a: Annotated[str, typer.Argument(help="A plan.json, or a bundle (folder or hf://org/name).", metavar="A")],
    b: Annotated[str, typer.Argument(help="What to compare it with, of the same kind.", metavar="B")],
    offline: o.Offline = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Compare two plans or two bundles without reading weights. Exit with 0 if they hold the same, with 7 if not.

    \b
    Examples:
    flexmerge diff plan.json new.json
    flexmerge diff bundle/ hf://org/bundle
    """
    from flexmerge_cli.bundle.differences import diff_value
    from flexmerge_cli.cli import output
    from flexmerge_cli.report.diff import DIFFERENT, show_diff

    value = diff_value(a, b, o.access_of(offline=offline, quiet=quiet))
    output.emit(value, as_json=as_json, quiet=quiet, show=lambda found: show_diff(found, every=verbose))
    if not value["equal"]:
        raise typer.Exit(DIFFERENT)
