"""README.md of a bundle: what the Hub and people read of it, and nothing of strangers' names that does more."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from flexmerge_cli.bundle.card import is_own_card
from flexmerge_cli.checkpoint.license import read_license

from ..families import plain, write_family
from ..program import fails, flexmerge, stored_sizes, succeeds, tree
from .bundles import copy, manifest_of


def card_of(bundle) -> ModelCard:
    return ModelCard.load(bundle / "README.md")


def licensed(root, licenses: dict[str, str | None], **more: str):
    """A family of two tasks, whose cards name licences: of `base`, task0 and task1. None: no card."""
    family = write_family(root / "family", plain(num_tasks=2))
    for name, license in licenses.items():
        folder = family.base if name == "base" else family.tasks[name]
        (folder / "README.md").unlink(missing_ok=True)
        if license is not None:
            (folder / "README.md").write_text(f"---\nlicense: {license}\n---\nA model.\n")
    succeeds("plan", *family.arguments, "-o", root / "plan.json")
    return family


def test_the_hub_reads_the_front_matter_and_tasks_have_their_bytes_and_distances(merged):
    card, manifest = card_of(merged), manifest_of(merged)
    assert card.data.library_name == "flexmerge" and {"flexmerge", "merge"} <= set(card.data.tags)
    assert card.data.license == "unknown" and card.data.base_model is None
    for name, task in manifest["tasks"].items():
        row = next(line for line in card.text.splitlines() if line.startswith(f"| `{name}` "))
        stored = sum(manifest["files"][path]["bytes"] for path in task["files"] if path.startswith("weights/"))
        assert f"| {stored:,} | {task['distance']:.4f} |" in row
    assert manifest["request"]["command"] in card.text
    assert 'subfolder="tasks/' in card.text and "flexmerge export hf://ORG/NAME --task task0" in card.text
    assert "flexmerge serve hf://ORG/NAME" in card.text


def test_the_card_counts_nothing_and_is_no_stranger(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    assert "README.md" not in manifest_of(bundle)["files"]
    assert sum(stored_sizes(bundle).values()) == succeeds("inspect", bundle, "--json").json["total_bytes"]
    (bundle / "README.md").write_text("# mine")
    assert "README.md" not in succeeds("inspect", bundle, "--verify").out


def test_an_unchanged_card_is_replaced_and_a_changed_one_is_kept(merged, tmp_path):
    bundle, plan = copy(merged, tmp_path / "b"), merged.parent / "plan.json"
    assert is_own_card(bundle / "README.md")
    succeeds("merge", plan, "-o", bundle, "--force", "--no-card")
    assert not (bundle / "README.md").exists()
    succeeds("merge", plan, "-o", bundle, "--force")
    text = (bundle / "README.md").read_text()
    (bundle / "README.md").write_text(text.replace("## Use", "## How we made it\n\n## Use"))
    before = tree(bundle)
    fails(2, "merge", plan, "-o", bundle, "--force", says="what flexmerge did not write: README.md")
    assert tree(bundle) == before


def test_the_same_bundle_has_the_same_card(merged, tmp_path):
    succeeds("merge", merged.parent / "plan.json", "--method", "average", "--size", "2x", "-o", tmp_path / "other-name")
    assert (tmp_path / "other-name/README.md").read_bytes() == (merged / "README.md").read_bytes()


@pytest.mark.parametrize(
    ("licenses", "front", "lines"),
    [
        ({"base": "mit", "task0": "mit", "task1": "mit"}, "mit", ["- `mit`: the base, `task0`, `task1`"]),
        (
            {"base": "apache-2.0", "task0": "llama3", "task1": "apache-2.0"},
            "other",
            ["- `apache-2.0`: the base, `task1`", "- `llama3`: `task0`", "different licences"],
        ),
        (
            {"base": "mit", "task0": None, "task1": "mit"},
            "unknown",
            ["- `mit`: the base, `task1`", "- **unknown**: `task0`"],
        ),
        (
            {"base": "mit", "task0": "other\nlicense_name: own-terms", "task1": "[mit, gpl-3.0]"},
            "other",
            ["- `own-terms`: `task0`", "- mit, gpl&#45;3&#46;0: `task1`"],
        ),
    ],
    ids=["one", "conflict", "unknown", "own and several"],
)  # fmt: skip
def test_licences_are_those_of_the_sources_cards(licenses, front, lines, tmp_path):
    licensed(tmp_path, licenses)
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "b")
    card = card_of(tmp_path / "b")
    assert card.data.license == front
    text = card.text.replace("&#46;", ".").replace("gpl&#45;3.0", "gpl&#45;3&#46;0")
    for line in lines:
        assert line in text
    assert ("different licences" in text) == (len(set(licenses.values()) - {None}) > 1)


HOSTILE = "www.evil.com a|b`c](http://x) <script>\n---\n# [x]: $(rm)"


def test_names_of_strangers_are_text(tmp_path):
    """A folder may be called anything, and a card may name any licence."""
    family = licensed(tmp_path, {"base": json.dumps("mit <b>|` " + "](http://evil)"), "task0": "mit"})
    odd = family.tasks["task0"].parent / HOSTILE.replace("/", "_")
    shutil.move(family.tasks["task0"], odd)
    tasks = ("--task", f"task0={odd}", "--task", f"task1={family.tasks['task1']}")
    succeeds("plan", "--base", family.base, *tasks, "-o", tmp_path / "odd.json")
    succeeds("merge", tmp_path / "odd.json", "-o", tmp_path / "b")
    card = card_of(tmp_path / "b")
    assert [line for line in card.text.splitlines() if line.startswith("#")] == [
        "# 2 fine-tuned models in one bundle", "## Tasks", "## Use", "## Licences",
    ]  # fmt: skip
    assert (
        "<script" not in card.text and "](http" not in card.text and "www." not in card.text and "<b>" not in card.text
    )
    rows = [line for line in card.text.splitlines() if line.startswith("| `")]
    assert [len(re.findall(r"\|", row)) for row in rows] == [6, 6]


def test_sources_of_the_hub_are_base_models(hub, tmp_path):
    family = licensed(tmp_path, {"base": "mit", "task0": "mit", "task1": "mit"})
    for name, folder in {"base": family.base, **family.tasks}.items():
        hub.add(f"org/{name}", folder)
    tasks = [word for name in family.tasks for word in ("--task", f"{name}=hf://org/{name}")]
    succeeds("plan", "--base", "hf://org/base", *tasks, "-o", tmp_path / "hub.json")
    hub.forget()
    succeeds("merge", tmp_path / "hub.json", "-o", tmp_path / "b")
    assert hub.requests == [], "licences are in the plan"
    card = card_of(tmp_path / "b")
    assert card.data.base_model == ["org/base", "org/task0", "org/task1"]
    assert card.data.to_dict()["base_model_relation"] == "merge" and card.data.license == "mit"
    assert "[`org/task1`](https://huggingface.co/org/task1)" in card.text


def scores_of(folder, **more) -> dict:
    tasks = {
        "task0": {"metric": "accuracy", "merged": 0.9123, "fine_tuned": 0.95},
        "task1": {"metric": "own", "merged": None, "fine_tuned": 0.5},
    }
    return {"format": "flexmerge.eval/1", "bundle": manifest_of(folder)["id"], "tasks": tasks} | more


def with_scores(merged, path):
    return ("merge", merged.parent / "plan.json", "--method", "average", "--size", "2x", "--scores", path)


def test_scores_stand_beside_those_of_the_fine_tuned_models(merged, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(scores_of(merged)))
    merge = with_scores(merged, tmp_path / "scores.json")
    succeeds(*merge, "-o", tmp_path / "b")
    assert manifest_of(tmp_path / "b")["id"] == manifest_of(merged)["id"]
    rows = [line for line in (tmp_path / "b/README.md").read_text().splitlines() if line.startswith("| `")]
    assert rows[0].endswith("| `accuracy` | 91.2 % | 95.0 % |") and rows[1].endswith("| `own` | – | 0.5 |")
    assert rows[2].endswith("| – | – | – |")
    fails(2, *merge, "-o", tmp_path / "c", "--no-card", says="--no-card writes none")


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"bundle": "0" * 64}, 2, "the scores are of the bundle 000000"),
        ({"format": "flexmerge.eval/9"}, 2, "does not hold scores of a bundle"),
        ({"bundle": None}, 2, "does not hold scores of a bundle"),
        ({"tasks": []}, 2, "does not hold scores of a bundle"),
    ],
)
def test_scores_of_something_else_are_refused(change, code, says, merged, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(scores_of(merged, **change)))
    merge = with_scores(merged, tmp_path / "scores.json")
    fails(code, *merge, "-o", tmp_path / "b", says=says)
    assert not (tmp_path / "b").exists()
    (tmp_path / "scores.json").write_text("[" * 9)
    assert flexmerge(*merge, "-o", tmp_path / "b").code == 3


@pytest.mark.parametrize(
    "text",
    [
        "no front matter", "---\nlicense: mit\nno end", "---\n- mit\n---\n", "---\nlicense: [1, {}]\n---\n",
        "---\nlicense: *x\n---\n", "---\nlicense: " + "[" * 99 + "\n---\n", "---\nlicense: ''\n---\n",
        "---\nlicense: " + "x" * 999 + "\n---\n", "---\nlicense: \"a\\u001b[31m\"\n---\n", "\n---\nlicense: mit\n---\n",
    ],
)  # fmt: skip
def test_a_card_that_names_no_licence_soundly_names_none(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert read_license(tmp_path / "README.md") is None
    assert read_license(tmp_path) is None and read_license(tmp_path / "x") is None


def test_adapters_have_a_card(tmp_path):
    from ..adapters import LORA
    from ..adapters import make as make_adapters

    made = make_adapters(tmp_path / "made", "llama", {"a": LORA(r=2, target_modules=["q_proj"])})
    (made.tasks / "a/README.md").write_text("---\nlicense: mit\n---\n")
    for mode in ("keep", "merge", "pool"):
        succeeds(
            "plan", "--base", made.base, "--tasks", made.tasks, "--adapters", mode, "-o", tmp_path / f"{mode}.json"
        )
        succeeds("merge", tmp_path / f"{mode}.json", "-o", tmp_path / mode)
        text = (tmp_path / mode / "README.md").read_text()
        assert "- `mit`: `a`" in text and "- **unknown**: the base" in text
        assert ("PeftModel.from_pretrained(base" in text) == (mode == "keep")
