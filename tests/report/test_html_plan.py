from pathlib import Path

import numpy as np
import pytest

from flexmerge_cli.formats.plan_file import Plan, save_plan
from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.order.order import Merge
from flexmerge_cli.order.similarity import Similarity
from flexmerge_cli.report.html_block import leaf_order, tree_joins
from flexmerge_cli.report.html_plan import plan_page
from flexmerge_cli.report.inspect_plan import plan_facts
from tests.report.pages import Page, check_self_contained
from tests.report.plans import synthetic_plan

HOSTILE = "\"></bdi></title><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\u202e&amp;'`"


def page_of(plan: Plan, folder: Path, block: str | None = None) -> str:
    save_plan(plan, folder / "plan.json")
    return plan_page(plan_facts(folder / "plan.json", block))


def test_page_shows_every_block_and_stands_alone(tmp_path: Path) -> None:
    plan = synthetic_plan(5, 8)
    page = Page(page_of(plan, tmp_path))
    check_self_contained(page)
    assert [article["id"] for article in page.all("article")] == [f"block-{index}" for index in range(8)]
    assert [a["href"] for a in page.all("a")] == [f"#block-{index}" for index in range(8)]
    assert len(page.all("img")) == 8
    (dots, *_) = [path["d"] or "" for path in page.all("path") if path.get("class") == "dots"]
    assert dots
    assert sum((path["d"] or "").count("M") for path in page.all("path") if path.get("class") == "dots") == len(
        plan.order
    )


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    markup = page_of(synthetic_plan(4, 4, prefix=HOSTILE), tmp_path)
    page = Page(markup)
    check_self_contained(page)
    assert "\x1b" not in markup and "\u202e" not in markup
    assert "alert(1)" in "".join(page.text) and not any(img.get("src") == "x" for img in page.all("img"))


def test_the_block_that_was_asked_for_is_shown(tmp_path: Path) -> None:
    page = Page(page_of(synthetic_plan(3, 6), tmp_path, "encoder.layers.1.norm1"))
    assert [article["id"] for article in page.all("article") if article.get("class") == "chosen"] == ["block-4"]
    assert [option["value"] for option in page.all("option") if "selected" in option] == ["block-4"]


def test_a_plan_of_one_task_has_a_page(tmp_path: Path) -> None:
    page = Page(page_of(synthetic_plan(1, 3), tmp_path))
    check_self_contained(page)
    assert "task00" in "".join(page.text)


@pytest.mark.parametrize("similarity", [Similarity.COSINE, Similarity.EUCLIDEAN])
@pytest.mark.parametrize("linkage", [Linkage.SINGLE, Linkage.CENTROID])
def test_other_orders_have_a_page(similarity: Similarity, linkage: Linkage, tmp_path: Path) -> None:
    markup = page_of(synthetic_plan(6, 4, linkage=linkage, similarity=similarity), tmp_path)
    check_self_contained(Page(markup))
    assert "nan" not in markup.lower().replace("nano", "")


def test_page_of_thirty_tasks_stays_small(tmp_path: Path) -> None:
    """An element per number would take 100 kB a block; 300 blocks of a large model would be 30 MB."""
    page = page_of(synthetic_plan(30, 40), tmp_path)
    assert len(page.encode()) < 40 * 13_000


def test_leaves_of_a_group_lie_together() -> None:
    merges = [_merge((0,), (3,)), _merge((1,), (2,)), _merge((0, 3), (1, 2))]
    assert leaf_order(5, merges) == [0, 3, 1, 2, 4]


def test_tree_meets_where_its_similarity_is() -> None:
    merges = [(1, _merge((0,), (2,), 0.75)), (5, _merge((0, 2), (1,), 0.5))]
    joins = tree_joins(merges, [0, 2, 1], near=1.0, far=0.0)
    assert [meet for _, _, meet in joins] == [0.25, 0.5]
    (left, right, _) = joins[1]
    assert np.allclose([left, right], [(0.25, 2 / 3), (0.0, 1 / 6)])


def _merge(left: tuple[int, ...], right: tuple[int, ...], similarity: float = 0.5) -> Merge:
    return Merge(block=0, left=left, right=right, similarity=similarity)
