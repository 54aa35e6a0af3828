"""`flexmerge cache`."""

from typing import Annotated, Any

from flexmerge_cli.cli import options as o


def cache(
    clear: Annotated[
        bool, o.option("--clear", "", "Remove everything that is cached; it is recomputed when needed.")
    ] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Show what is cached below $XDG_CACHE_HOME/flexmerge, or remove it.

    \b
    Examples:
    flexmerge cache
    flexmerge cache --clear
    """
    from flexmerge_cli.cli.output import emit
    from flexmerge_cli.evaluation.cache import cache_contents, clear_cache
    from flexmerge_cli.report.text import human_bytes

    value = clear_cache() if clear else cache_contents()

    def show(found: dict[str, Any]) -> None:
        done = "removed from" if clear else "in"
        files = f"{found['entries']:,} file{'s' * (found['entries'] != 1)}"
        print(f"{files}, {human_bytes(found['bytes'])}, {done} {found['folder']}")

    emit(value, as_json=as_json, quiet=quiet, show=show)
