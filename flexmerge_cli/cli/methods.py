"""`flexmerge methods`."""

from typing import Annotated

import typer

from flexmerge_cli.cli import options as o


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Method, step or calibration to explain.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """List all methods, or explain one.

    \b
    Example:
    flexmerge methods ties
    """
    from flexmerge_cli.cli.output import emit
    from flexmerge_cli.report.methods import method_list, method_page, show_list, show_page

    if name is None:
        emit(method_list(), as_json=as_json, show=show_list)
    else:
        emit(method_page(name), as_json=as_json, show=show_page)
