"""Makes one self-contained page: no network, no foreign scripts, all text escaped. Knows nothing of plans and bundles.

Whatever comes from a file (names, sources) goes through `text` or `name`. The page's own policy refuses everything
that the page does not contain, should an escape ever be missing.
"""

import base64
import hashlib
import html
import re
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from flexmerge_cli.report.inspect_heat import NOTHING, RAMP, Colour, Scale, ink
from flexmerge_cli.report.text import printable, tail
from flexmerge_cli.version import GENERATOR
from flexmerge_cli.writing import has_start

BREAK = re.compile(r"(?<=[^…][._/])(?=.)")
NAME_CHARACTERS, NARROW_CHARACTERS = 34, 20  # of a block's name, on a wide page and on a narrow one


def text(value: object) -> str:
    """Escape for text and quoted attributes, and spell out control and direction marks."""
    return html.escape(printable(str(value)), quote=True)


def name(value: str, characters: int | None = None, *, breaks: bool = False) -> str:
    """Mark up a name from a file, isolated from the text direction around it; a long name is shortened to its end.

    breaks: whether it may be broken into several lines, after a dot, a slash or an underscore.
    """
    shown = value if characters is None else tail(value, characters)
    title = f' title="{text(value)}"' if shown != value else ""
    escaped = text(shown)
    return f"<bdi{title}>{BREAK.sub('<wbr>', escaped) if breaks else escaped}</bdi>"


def block_name(value: str) -> str:
    """Mark up a block's name, as long as the page's width allows; the style sheet shows one of two versions."""
    wide, narrow = (tail(value, characters) for characters in (NAME_CHARACTERS, NARROW_CHARACTERS))
    if wide == narrow:
        return name(value, NAME_CHARACTERS)
    title = text(value)
    return f'<bdi class=wide title="{title}">{text(wide)}</bdi><bdi class=narrow title="{title}">{text(narrow)}</bdi>'


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """Make the whole document. title: plain text. subtitle and sections: markup."""
    css, script = (Path(__file__).with_name(file).read_text(encoding="utf-8") for file in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"<header><h1>{name(title)}</h1>{subtitle}</header>\n<main>\n"
        + "\n".join(sections)
        + f"\n</main>\n<footer>{text(GENERATOR)}</footer>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def today() -> str:
    """Return the date that a page shows."""
    return datetime.now(UTC).date().isoformat()


def is_page(path: Path) -> bool:
    """Return whether a file is a page written by --html, which --force may replace."""
    return has_start(path, b"<!doctype html>")


def section(title: str, *parts: str, note: str = "") -> str:
    """Make a section. note: one sentence that says how to read it."""
    lead = f"<p class=note>{text(note)}</p>" if note else ""
    return f"<section>\n<h2>{text(title)}</h2>\n{lead}{''.join(parts)}\n</section>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Make a list of terms and values (markup), side by side."""
    return "<dl>" + "".join(f"<div><dt>{text(term)}</dt><dd>{value}</dd></div>" for term, value in pairs) + "</dl>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, words: Collection[int] = ()) -> str:
    """Make a table. Cells are markup; the first `left` columns, and those of words, are left-aligned. Scrolls sideways
    on narrow pages."""
    of_words = {*range(left), *words}
    head = "".join(
        f"<th scope=col{' class=l' if place in of_words else ''}>{text(c)}</th>" for place, c in enumerate(columns)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=l' if place in of_words else ''}>{cell}</td>" for place, cell in enumerate(row))
        + "</tr>\n"
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def cells(
    columns: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]], *, corner: str = "", first: str = ""
) -> str:
    """Make a matrix of coloured cells. columns: `th` elements. rows: markup of each row's name, and its `td` elements.
    first: a row before these. Scrolls sideways on narrow pages."""
    body = first + "".join(f"<tr><th scope=row>{head}</th>{''.join(row)}</tr>\n" for head, row in rows)
    head = f"<thead><tr><th>{corner}</th>{''.join(columns)}</tr></thead>"
    return f"<div class=scroll><table class=cells>{head}<tbody>\n{body}</tbody></table></div>"


def css_colour(colour: Colour | Sequence[float]) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def cell_style(scale: Scale, value: float) -> str:
    paper = scale.colour(value)
    return f"background:{css_colour(paper)};color:{css_colour(ink(paper))}"


def legend(low: str, high: str, *, gaps: bool = False) -> str:
    """Draw the colour ramp with labelled ends. gaps: whether some cells have no number."""
    none = f'<span class=none><i style="background:{css_colour(NOTHING)}"></i> no number</span>' if gaps else ""
    stops = ",".join(map(css_colour, RAMP))
    return (
        f"<p class=legend><span>{text(low)}</span>" + f'<i style="background:linear-gradient(to right,{stops})"></i>'
        f"<span>{text(high)}</span>{none}</p>"
    )
