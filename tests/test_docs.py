"""The docs are complete and their links hold: methods, keys, commands, exit codes are where one looks for them."""

import importlib
import json
import pkgutil
import re
from typing import Any

import pytest
from pydantic import BaseModel

import flexmerge_cli
from flexmerge_cli import errors
from flexmerge_cli.cli.app import COMMANDS
from flexmerge_cli.methods.registry import all_methods
from flexmerge_cli.report.methods import method_list

from .program import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def documented() -> list[Any]:
    """(heading, what `flexmerge methods` tells) of everything that takes arguments."""
    found = method_list()
    headings = {method["name"]: method for method in (*found["search"], *found["methods"])}
    headings |= {f"step {step['name']}": step for step in found["steps"]}
    headings |= {f"calibration {one['name']}": one for one in found["calibrations"]}
    return [pytest.param(heading, one["arguments"], id=heading) for heading, one in headings.items()]


@pytest.mark.parametrize(("heading", "arguments"), documented())
def test_every_method_is_explained_with_its_arguments_ranges_and_defaults(heading, arguments):
    section = re.search(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", read("docs/methods.md"), re.MULTILINE | re.DOTALL)
    assert section, f"docs/methods.md has no heading `{heading}`"
    table = re.search(r"^\| argument \|.*\n\|.*\n((?:\|.*\n)+)", section[1], re.MULTILINE)
    rows = [re.split(r"(?<!\\)\|", line)[1:4] for line in table[1].splitlines()] if table else []
    described = {name.strip(" `"): (takes, default.strip(" `")) for name, takes, default in rows}
    assert list(described) == [argument["name"] for argument in arguments]
    for argument in arguments:
        takes, default = described[argument["name"]]
        written = argument["default"]
        assert default == (written if isinstance(written, str) else json.dumps(written)), argument
        interval = re.search(r"[\[(][^,\])]+, [^,\])]+[\])]", argument["takes"])
        if interval and argument["name"] != "centre_bits":  # of which only some are allowed
            assert interval[0] in takes, argument


def records() -> list[type[BaseModel]]:
    """Every schema of a file: the models of all modules."""
    found: set[type[BaseModel]] = set()
    for module in pkgutil.walk_packages(flexmerge_cli.__path__, "flexmerge_cli."):
        if not module.name.endswith(("__main__", "_native", "_decode", "serving.fused")):  # the last needs Triton
            values = vars(importlib.import_module(module.name)).values()
            found |= {value for value in values if isinstance(value, type) and issubclass(value, BaseModel)}
    return sorted((one for one in found if one.__module__.startswith("flexmerge_cli")), key=lambda one: one.__name__)


def test_every_key_of_every_file_and_request_is_described():
    pages = "".join(read(f"docs/{page}.md") for page in ("formats", "evaluation", "serving"))
    described = set(re.findall(r"`([^`\n]+)`", without_code(pages)))
    keys = {field.alias or name: one.__name__ for one in records() for name, field in one.model_fields.items()}
    assert len(keys) > 90
    assert {key: where for key, where in keys.items() if key not in described} == {}


def test_every_command_is_in_the_readme_and_every_exit_code_is_explained():
    listed = list(COMMANDS)
    assert set(listed) >= {"plan", "merge", "inspect", "export", "eval", "curve", "methods"}
    assert [name for name in listed if f"flexmerge {name}" not in read("README.md")] == []
    codes = {one.exit_code for one in vars(errors).values() if isinstance(one, type) and hasattr(one, "exit_code")}
    assert [code for code in {0, 130, *codes} if f"| {code} |" not in read("docs/exit-codes.md")] == []


def test_the_readme_counts_the_methods():
    assert f"{len(all_methods())} methods, their steps" in read("README.md")


def anchors(text: str) -> set[str]:
    """Make anchors as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        place = page.parent / path if path else page
        assert place.exists(), f"{page.name}: no {target}"
        assert not anchor or anchor in anchors(place.read_text()), f"{page.name}: no {target}"


def test_the_index_lists_every_page():
    listed = set(re.findall(r"\]\(([\w.-]+\.md)\)", read("docs/README.md")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} == listed


def test_the_readme_stays_short():
    assert len(read("README.md").splitlines()) <= 250


def test_the_layout_has_a_line_for_every_folder_of_the_package_and_no_other():
    layout = read("docs/architecture.md").partition("## Layout")[2].partition("## Invariants")[0]
    folders = {path.parent.name for path in (ROOT / "flexmerge_cli").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", layout, re.MULTILINE)) == folders


def test_what_an_answer_names_is_in_the_files_that_it_links():
    answers = read("docs/architecture.md").partition("## Where does it happen?")[2].partition("## How to add")[0]
    rows = [line for line in answers.splitlines() if "](" in line]
    assert len(rows) >= 10
    for row in rows:
        linked = [ROOT / "docs" / target for target in re.findall(r"\]\(([^)#]+)", row)]
        files = [file for path in linked for file in ([path] if path.is_file() else path.rglob("*.py"))]
        text = "".join(file.read_text() for file in files)
        for name in re.findall(r"`([^`]+)`", row.partition(" | ")[2]):
            assert name.rpartition(".")[2].rstrip("=") in text, row


def test_no_class_name_stands_for_two_things():
    sources = [file.read_text() for file in (ROOT / "flexmerge_cli").rglob("*.py")]
    names = [name for source in sources for name in re.findall(r"^class ([A-Z]\w*)", source, re.MULTILINE)]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def folders_with(pattern):
    found = re.compile(pattern)
    return {file.parent.name for file in (ROOT / "flexmerge_cli").rglob("*.py") if found.search(file.read_text())}


def test_few_folders_know_the_kinds_of_kept_members():
    """All others ask a member what it has, stores and needs, so a new kind concerns family/ and formats/ alone."""
    known = folders_with(r"\.adapter is (not )?None|\b(PlanAdapter|AdapterEntry|KeptAdapter)\b")
    assert known == {"family", "formats", "planning"}


def test_few_folders_know_that_adapters_can_be_merged_or_form_a_pool():
    """All others ask whether tensors merge by their products, and a plan or a task what it needs and cannot give."""
    asks = r"\badapters == |[\"']pool[\"']|\.pooled\b|\bpools\b|(?i:(pool of|pooled) (lora )?adapters?|of a pool\b)"
    assert folders_with(asks) == {"family", "formats"}


def test_few_folders_know_vocabularies():
    """All others ask a plan or a manifest for a tensor's rows, or for its division; reports print what a plan has."""
    asks = r"\.vocabularies\b|\b(plan|family|manifest)\.vocabular|split_vocabularies|\bVocabulary(Entry)?\b"
    assert folders_with(asks) == {"family", "formats", "report"}
