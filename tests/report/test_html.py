import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmerge_cli.report import html
from flexmerge_cli.report.html import block_name, name
from flexmerge_cli.report.html_chart import fraction, nice_ticks
from flexmerge_cli.report.text import tail
from tests.report.pages import Page


@given(st.text(max_size=200))
def test_any_name_is_one_piece_of_text(value: str) -> None:
    for markup in (name(value), name(value, 12), name(value, 40, breaks=True), block_name(value)):
        page = Page(markup)
        assert {tag for tag, _ in page.elements} <= {"bdi", "wbr"}
        assert all(set(attributes) <= {"title", "class"} for _, attributes in page.elements)


@given(st.text(max_size=200), st.integers(3, 60))
def test_a_tail_is_short_and_ends_the_name(value: str, characters: int) -> None:
    shown = tail(value, characters)
    assert len(shown) <= characters or shown == value
    assert value.endswith(shown.removeprefix("…"))


def test_a_tail_begins_at_a_dot_where_it_can() -> None:
    assert tail("vision_model.encoder.layers.11.self_attn", 24) == "…layers.11.self_attn"
    assert tail("visual_projection", 24) == "visual_projection"


@pytest.mark.parametrize(("low", "high"), [(0, 8), (0, 0), (-0.3, 0.91), (1, 1.0001), (0, 3e12), (0, 1e-9), (5, 4)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 7 and all(map(math.isfinite, ticks))
    assert high < low or all(low - 1e-9 * abs(low) <= tick <= high * (1 + 1e-9) for tick in ticks)


def test_fraction_of_nothing_is_zero() -> None:
    assert fraction(3.0, 3.0, 3.0) == 0.0


@pytest.mark.parametrize("sheet", ["page.css", "eval.css"])
def test_colours_of_a_page_are_those_of_the_readers_scheme(sheet):
    """A colour outside of the variables would be the same on a light and on a dark page."""
    css = (Path(html.__file__).parent / sheet).read_text(encoding="utf-8")
    rules = re.sub(r":root \{[^}]*\}", "", css)
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", rules)) <= {"#d55e00"}, "of a warning's edge"
    if sheet == "page.css":
        light, dark = re.findall(r":root \{([^}]*)\}", css)[:2]
        assert "prefers-color-scheme: dark" in css and "color-scheme: light dark" in light
        colours = r"(--[a-z]+): #"
        assert set(re.findall(colours, light)) == set(re.findall(colours, dark))
