"""Plans and manifests that tell of vocabularies, and do not fit together: refused, whoever sealed them."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli import open_bundle
from flexmerge_cli.errors import IntegrityError

from .bundle.bundles import copy, manifest_of, reads_or_says_why
from .bundle.bundles import seal as seal_manifest
from .families import ODD, assert_same_state, write_family
from .hostile import SLOW_FILES, json_values, sealed
from .program import fails, flexmerge, succeeds, tree

EMBEDDING = "embed_tokens.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A family of five tensors, one of them tied to a resized embedding; its plan, and a bundle at 1x."""
    models = ODD["tied"]()
    layer = "encoder.layer.0.output"
    keep = (EMBEDDING, "lm_head.weight", "pooler.dense.weight", f"{layer}.dense.weight", f"{layer}.LayerNorm.weight")
    for number, (name, state) in enumerate({"base": models.base, **models.tasks}.items()):
        for other in set(state) - set(keep):
            del state[other]
        rows = {"task1": 14, "task2": 9}.get(name, 11)
        state[EMBEDDING] = state[EMBEDDING].repeat(2, 1)[:rows] + number
        state["lm_head.weight"] = state[EMBEDDING].clone()
    folders = write_family(tmp_path_factory.mktemp("made"), models)
    succeeds("plan", *folders.arguments, "-o", folders.root / "plan.json")
    succeeds("merge", folders.root / "plan.json", "--method", "average", "--size", "1x", "-o", folders.root / "bundle")
    return folders


def test_a_view_of_rows_goes_on_with_the_bundle_that_was_opened(made, tmp_path):
    """A tensor that is put together from rows reads two files."""
    bundle = copy(made.root / "bundle", tmp_path / "b")
    expected = dict(open_bundle(bundle).view("task1", copy=True))
    view, late = open_bundle(bundle).view("task1"), open_bundle(bundle)
    succeeds("merge", made.root / "plan.json", "-o", bundle, "--force")
    assert_same_state(view, expected)
    with pytest.raises(IntegrityError, match="was replaced or changed since"):
        dict(late.view("task1"))


def vocabulary(fields):
    return fields["vocabularies"][0]


PLANS = {
    "of no tensor": lambda f: vocabulary(f)["tensors"].append("nowhere"),
    "of one tensor twice": lambda f: vocabulary(f)["tensors"].append(EMBEDDING),
    "twice": lambda f: f["vocabularies"].append(vocabulary(f)),
    "of a task too few": lambda f: vocabulary(f)["tasks"].pop(),
    "gone": lambda f: f.update(vocabularies=[]),
    "without rows": lambda f: f.update(rows=[]),
    "without the tied one": lambda f: vocabulary(f)["tensors"].remove("lm_head.weight"),
    "a run of nothing": lambda f: vocabulary(f)["tasks"][1].update(common=[[0, 0], [0, 9]]),
    "runs over each other": lambda f: vocabulary(f)["tasks"][1].update(common=[[0, 5], [4, 4]]),
    "runs behind the end": lambda f: vocabulary(f)["tasks"][1].update(common=[[6, 9]]),
    "a row too few": lambda f: vocabulary(f)["tasks"][1].update(common=[[0, 8]]),
    "another number of rows": lambda f: vocabulary(f)["tasks"][1].update(rows=15),
    "of the base a row too few": lambda f: vocabulary(f)["base"].update(common=[[0, 8]]),
    "rows that merge": lambda f: f["rows"][0].update({"class": "mergeable"}),
    "rows of another width": lambda f: f["rows"][0].update(shape=[2, 7], shapes=None),
    "rows of another name": lambda f: f["rows"][0].update(name="pooler.dense.weight@rows"),
    "rows twice": lambda f: f["rows"].append(f["rows"][0]),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANS)
def test_a_plan_whose_vocabulary_does_not_fit_is_refused(what, made, tmp_path):
    fields = json.loads((made.root / "plan.json").read_bytes())
    PLANS[what](fields)
    (tmp_path / "plan.json").write_bytes(sealed(fields, "sha256"))
    fails(2, "merge", tmp_path / "plan.json", "-o", tmp_path / "b", says="make it again")


MANIFESTS = {
    "of no tensor": lambda f: vocabulary(f)["tensors"].append("nowhere"),
    "of no task": lambda f: vocabulary(f)["tasks"].update(nobody={"rows": 9, "common": [[0, 9]]}),
    "twice": lambda f: f["vocabularies"].append(vocabulary(f)),
    "gone": lambda f: f.update(vocabularies=[]),
    "without rows": lambda f: f.pop("rows"),
    "without the tied one": lambda f: vocabulary(f)["tensors"].remove("lm_head.weight"),
    "without its target": lambda f: vocabulary(f)["tensors"].remove(EMBEDDING),
    "a run of nothing": lambda f: vocabulary(f)["tasks"]["task1"].update(common=[[0, 0], [0, 9]]),
    "runs over each other": lambda f: vocabulary(f)["tasks"]["task1"].update(common=[[0, 5], [4, 4]]),
    "runs behind the end": lambda f: vocabulary(f)["tasks"]["task1"].update(common=[[6, 9]]),
    "a row too few": lambda f: vocabulary(f)["tasks"]["task1"].update(common=[[0, 8]]),
    "another number of rows": lambda f: vocabulary(f)["tasks"]["task1"].update(rows=2**62),
    "a negative number": lambda f: vocabulary(f)["tasks"]["task1"].update(rows=-1),
    "rows of another shape": lambda f: f["rows"][0]["shapes"].update(task1=[4, 8]),
    "rows that are tied": lambda f: f["rows"][0].update({"class": "tied", "of": "pooler.dense.weight"}),
    "an unknown key": lambda f: vocabulary(f).update(extra=1),
}  # fmt: skip


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_whose_vocabulary_does_not_fit_is_refused(what, made, tmp_path):
    bundle = copy(made.root / "bundle", tmp_path / "b")
    fields = manifest_of(bundle)
    MANIFESTS[what](fields)
    seal_manifest(bundle, fields)
    fails(3, "export", bundle, "--task", "task1", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW_FILES)
@given(st.data())
def test_mutated_vocabularies_end_in_a_clean_error(made, tmp_path, data):
    """The plan and the manifest are read, merged, viewed; nothing but what was asked for is written."""
    fields = json.loads((made.root / "plan.json").read_bytes())
    changed = data.draw(json_values({key: fields[key] for key in ("vocabularies", "rows")}))
    if isinstance(changed, dict):
        (made.root / "mutated.json").write_bytes(sealed(fields | changed, "sha256"))
        shutil.rmtree(made.root / "made", ignore_errors=True)
        before = set(tree(made.root))
        result = flexmerge("merge", made.root / "mutated.json", "-o", made.root / "made")
        assert result.code in (0, 2, 3) or "no space at" in result.err
        assert all(name.startswith("made") for name in set(tree(made.root)) - before)
    bundle = tmp_path / "b"
    if not bundle.exists():
        copy(made.root / "bundle", bundle)
    fields = manifest_of(made.root / "bundle")
    changed = data.draw(json_values({key: fields[key] for key in ("vocabularies", "rows")}))
    if isinstance(changed, dict):
        seal_manifest(bundle, fields | changed)
        reads_or_says_why(bundle)
