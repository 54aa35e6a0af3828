"""A rich console that colours our own output and ignores markup in names from files."""

import sys
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment

from flexmerge_cli.report.text import visible


class Console(rich.console.Console):
    """A rich console that prints control characters in visible form, but keeps rich's own colours and cursor
    movements."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        # While bars are shown, rich puts itself between us and sys.stderr, so the bars keep the stream of before.
        file = getattr(sys.stderr, "rich_proxied_file", sys.stderr) if stderr else None
        super().__init__(file=file, stderr=stderr, highlight=False, markup=False, emoji=False, **options)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
