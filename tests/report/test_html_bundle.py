import pytest

from flexmerge_cli.bundle.locate import Located
from flexmerge_cli.report.html_bundle import bundle_page
from flexmerge_cli.report.inspect_bundle import bundle_facts
from tests.report.examples import bundle_path
from tests.report.pages import Page, check_self_contained


@pytest.mark.parametrize(("method", "size"), [("average", "3x"), ("emr", "3x"), (None, None)])
def test_page_routes_every_task_through_every_block(method: str | None, size: str | None) -> None:
    facts = bundle_facts(Located(path=bundle_path(method, size)))
    page = Page(bundle_page(facts))
    check_self_contained(page)
    cells = [cell for cell in page.all("td") if (cell.get("title") or "").startswith("sun397: ")]
    assert len(cells) == 2 * len(facts.bundle.manifest.units)  # its group, and its distance
    text = "".join(page.text)
    assert facts.bundle.manifest.id in text and "vision_model.post_layernorm" in text


def test_page_shows_the_bits_that_auto_chose() -> None:
    facts = bundle_facts(Located(path=bundle_path("auto", "1x")))
    page = Page(bundle_page(facts))
    check_self_contained(page)
    units = facts.bundle.manifest.units
    stored = [(group.bits or {}).get("sun397") for unit in units for group in unit.groups if "sun397" in group.tasks]
    titles = [f"sun397: {'exact' if bits is None else f'{bits} bits'}" for bits in stored]
    found = [cell["title"] for cell in page.all("td") if (cell.get("title") or "").startswith("sun397: ")]
    assert found[: len(units)] == titles and len(set(titles)) > 1, "and no letters, which would all be one"
