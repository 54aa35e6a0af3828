"""Progress of `eval`, on stderr if that is a terminal: the model being scored, its progress, and what remains."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flexmerge_cli.cli.options import bars_on_stderr, note

OnStep = Callable[[str, int, int], None]


@contextmanager
def scoring_progress(total: int, *, quiet: bool) -> Iterator[OnStep]:
    """Yields a function of (model and task, examples done, examples in all). total: number of models to score.

    Without a terminal, prints one line per model unless quiet.
    """
    seen: dict[str, None] = {}
    if quiet or not sys.stderr.isatty():

        def tell(what: str, _done: int, _total: int) -> None:
            if what not in seen:
                seen[what] = None
                note(f"scoring {what} ({len(seen)} of {total})", quiet=quiet)

        yield tell
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

    with bars_on_stderr(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bars:
        whole, model = bars.add_task("models", total=total), bars.add_task("")

        def update(what: str, done: int, of: int) -> None:
            if what not in seen:
                bars.update(whole, completed=len(seen))
                seen[what] = None
            bars.update(model, description=what, completed=done, total=of)

        yield update
