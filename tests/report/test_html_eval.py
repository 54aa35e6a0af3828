"""The page and the picture of a curve."""

import re

import pytest

from flexmerge_cli.report.curve import show_curve
from flexmerge_cli.report.curve_png import write_png
from flexmerge_cli.report.curve_series import STYLES, ranking, series_of, sizes_of
from flexmerge_cli.report.html_eval import curve_page

from ..program import ROOT
from .browser import CHROMIUM, open_page
from .pages import Page, check_self_contained
from .records import record

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def points_in(markup: str) -> list[tuple[str, int, float]]:
    marks = [mark for mark in Page(markup).all("i") if "data-method" in mark]
    return sorted((m["data-method"] or "", int(m["data-bytes"] or 0), float(m["data-value"] or 0)) for m in marks)


def points_of(found: dict) -> list[tuple[str, int, float]]:
    points = found["points"] + found["alternatives"]
    return sorted((point["method"], point["bytes"], point["mean"]["value"] or 0.0) for point in points)


@pytest.mark.parametrize("methods, tasks", [(0, 1), (1, 1), (4, 3), (8, 8), (28, 20)])
def test_points_of_the_page_are_those_of_the_document(methods, tasks):
    found = record(methods, tasks)
    assert points_in(curve_page(found, "plan.json")) == points_of(found)


@pytest.mark.parametrize("sizes", [(), ("2x",)])
def test_a_page_holds_itself_with_few_points_too(sizes):
    found = record(2, 1, sizes=sizes)
    check_self_contained(Page(curve_page(found, "plan.json")))


def test_a_page_refers_to_nothing_and_obeys_no_name():
    found = record(3, 2, name="<script>alert(1)</script>\"'\u202e")
    markup = curve_page(found, "plan.json")
    page = Page(markup)
    check_self_contained(page)
    assert "<script>alert" not in markup
    assert "\u202e" not in markup


def test_what_depends_on_data_is_marked():
    found = record() | {"data_dependent": {"arguments": "scale=1.25", "spec": "val.yaml"}}
    text = " ".join(Page(curve_page(found, "plan.json")).text)
    assert "Data-dependent" in text and "scale=1.25" in text and "val.yaml" in text
    assert "Data-dependent" not in " ".join(Page(curve_page(record(), "plan.json")).text)


def test_as_many_methods_as_there_are_styles_are_told_apart():
    few, many = series_of(record(len(STYLES))), series_of(record(28))
    assert [one.style for one in few] == list(STYLES)
    assert sum(not one.is_grey for one in many) == len(STYLES)
    best = {
        max((p["mean"]["value"], p["method"]) for p in record(28)["points"] if size in p["sizes"])[1]
        for size in sizes_of(record(28))
    }
    assert best <= {one.method for one in many if not one.is_grey}


def test_ranking_is_by_the_mean_of_those_that_reach_the_size():
    found = record(4, 2)
    places = ranking(found, "1x")
    assert set(places) == {"method0:bits=0", "method3:bits=3"}
    assert places["method3:bits=3"] == 1 and places["method0:bits=0"] == 2


def test_methods_within_the_interval_of_the_best_share_its_rank():
    found = record(4, 2, sizes=("3x", "3x", "3x"))
    found["points"] = [point for place, point in enumerate(found["points"]) if place in (0, 3, 5, 6)]
    ends = {"a": (0.90, 0.94), "b": (0.88, 0.92), "c": (0.86, 0.91), "d": (0.80, 0.85)}
    for point, (method, (low, high)) in zip(found["points"], ends.items()):
        point |= {
            "method": method,
            "sizes": ["3x"],
            "mean": point["mean"] | {"value": (low + high) / 2, "interval": [low, high]},
        }
    assert ranking(found, "3x") == {"a": 1, "b": 1, "c": 1, "d": 4}
    found["tasks"] = {task: record_ | {"higher_is_better": False} for task, record_ in found["tasks"].items()}
    assert ranking(found, "3x") == {"d": 1, "a": 2, "b": 2, "c": 2}


def test_the_page_says_what_it_is_of():
    found = record() | {"spec": {"path": "eval.yaml", "sha256": "cd" * 32}}
    page = Page(curve_page(found, "digits.json"))
    text = " ".join(page.text)
    assert "digits.json: accuracy against size" in text and "eval.yaml" in text
    assert re.search(r"\b20\d\d-\d\d-\d\d\b", text)


def test_axes_have_titles_and_scores_are_in_percent():
    text = " ".join(Page(curve_page(record(), "plan.json")).text)
    assert "accuracy, mean over 3 tasks, %" in text and "tensor data stored, in models (x) and bytes" in text
    assert "92.0" in text and "0.9200" not in text


@pytest.mark.parametrize("methods", [0, 1, 8, 28])
def test_the_picture_is_a_png(tmp_path, methods):
    write_png(record(methods), tmp_path / "curve.png")
    data = (tmp_path / "curve.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") >= 1600


def test_what_is_beyond_all_numbers_is_in_the_tables_and_in_no_picture(tmp_path, capsys):
    """A model that a merge has broken: its perplexity is null."""
    found = record(2, 2)
    for point in (found["points"][0], found["alternatives"][1]):
        point["mean"] |= {"value": None, "interval": None, "normalised": None}
        point["tasks"]["task0"] |= {"value": None, "interval": None, "normalised": None}
    found["tasks"]["task1"] |= {"base": None, "base_interval": None}
    found["mean"]["base"] = None
    page = curve_page(found, "plan.json")
    check_self_contained(Page(page))
    assert len(points_in(page)) == len(points_of(found)) - 2
    write_png(found, tmp_path / "curve.png")
    show_curve(found)
    assert "method0:bits=0" in capsys.readouterr().out


def test_means_over_different_metrics_are_of_parts_and_rise():
    found = record(2, 2)
    found["tasks"]["task0"] |= {"metric": "perplexity", "higher_is_better": False}
    assert "part of the fine-tuned score" in " ".join(Page(curve_page(found, "plan.json")).text)
    found["tasks"]["task1"] |= {"metric": "kl_divergence", "higher_is_better": False}
    best = max((p for p in found["points"] if "3x" in p["sizes"]), key=lambda point: point["mean"]["value"])
    assert ranking(found, "3x")[best["method"]] == 1


@needs_browser
def test_a_browser_opens_the_page_without_an_error_or_a_request(tmp_path):
    found = record(28, 8)
    (tmp_path / "page.html").write_text(curve_page(found, "plan.json"), encoding="utf-8")
    opened = open_page(tmp_path / "page.html", tmp_path)
    assert opened.console == [] and opened.requests == []
    assert opened.dom.count("data-method=") == len(found["points"]) + len(found["alternatives"])


@needs_browser
def test_a_browser_would_tell_of_errors_and_requests(tmp_path):
    (tmp_path / "page.html").write_text("<img src=http://example.invalid/x.png><script>nothing.at.all</script>")
    opened = open_page(tmp_path / "page.html", tmp_path)
    assert opened.console and opened.requests


def test_the_picture_in_the_docs_has_all_its_colours():
    """It had a palette of 64 colours, in which two methods were one teal."""
    data = (ROOT / "samples" / "digits" / "curve.png").read_bytes()
    assert data[25] in (2, 6), "of a PNG: red, green and blue for each pixel, with or without alpha"
