"""The page of a bundle that was scored, and of sources."""

import pytest

from flexmerge_cli.report.html_scores import scores_page

from .browser import open_page
from .pages import Page, check_self_contained
from .records import ONE, scores
from .test_html_eval import needs_browser, points_in


def page_of(document):
    return scores_page(document, "a bundle of mine")


def sources(num_tasks: int) -> dict:
    """Make the record that `eval --sources` has."""
    found = scores(num_tasks)
    for key in ("bundle", "methods", "num_models", "one_model_bytes", "stored_bytes", "total_bytes", "factor"):
        del found[key]
    for record in found["tasks"].values():
        del record["scores"]["merged"]
        record |= {"merged": None, "merged_interval": None, "normalised": None}
    return found | {"mean": found["mean"] | {"merged": None, "normalised": None}}


@pytest.mark.parametrize("num_tasks", [1, 3, 20])
def test_the_point_is_the_bundle_and_the_circle_copies_of_all_models(num_tasks):
    found = scores(num_tasks)
    wanted = [
        ("average", 2 * ONE, found["mean"]["merged"]),
        ("copies", (num_tasks + 1) * ONE, found["mean"]["fine_tuned"]),
    ]
    assert points_in(page_of(found)) == [(name, size, pytest.approx(value)) for name, size, value in wanted]


def test_copies_are_shown_only_where_their_scores_are_known():
    found = scores()
    for record in found["tasks"].values():
        record |= {"fine_tuned": None, "fine_tuned_interval": None, "normalised": None}
        del record["scores"]["fine_tuned"]
    found["mean"] |= {"fine_tuned": None, "normalised": None}
    assert [name for name, *_ in points_in(page_of(found))] == ["average"]


def test_the_page_has_the_table_of_the_terminal_and_every_number():
    from flexmerge_cli.report.evaluation import score_table

    found = scores(2)
    text = Page(page_of(found)).text
    for row in score_table(found)[1]:
        assert set(filter(None, row)) <= set(text)
    assert text.count("f1") == 2 * 3 and text.count("test") == 2 * 3 * 2
    assert "task1 (worst)" in text


def test_sources_have_a_page_without_a_curve():
    page = Page(page_of(sources(2)))
    check_self_contained(page)
    assert page.all("figure") == [] and "fine-tuned" in page.text and "merged" not in page.text


@pytest.mark.parametrize("what", ["merged", "fine_tuned"])
def test_a_score_beyond_all_numbers_is_a_dash(what):
    found = scores(2)
    found["tasks"]["task0"] |= {what: None, f"{what}_interval": None, "normalised": None}
    found["mean"] |= {what: None, "normalised": None}
    found["tasks"]["task0"]["scores"][what] |= {"value": None, "interval": None}
    check_self_contained(Page(page_of(found)))


def test_a_page_refers_to_nothing_and_obeys_no_name():
    markup = page_of(scores(2, name="<script>alert(1)</script>\"'\u202e") | {"methods": ["<b>x</b>"]})
    check_self_contained(Page(markup))
    assert "<script>alert" not in markup and "\u202e" not in markup and "<b>x" not in markup


def test_the_verdict_of_a_gate_is_on_the_page():
    text = " ".join(Page(page_of(scores() | {"gate": {"message": "fail: task2: lost 5 %"}})).text)
    assert "fail: task2: lost 5 %" in text


@needs_browser
def test_a_browser_opens_the_page_without_an_error_or_a_request(tmp_path):
    (tmp_path / "page.html").write_text(page_of(scores(8)), encoding="utf-8")
    opened = open_page(tmp_path / "page.html", tmp_path)
    assert opened.console == [] and opened.requests == []
    assert opened.dom.count("data-method=") == 2
