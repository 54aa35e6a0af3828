"""plan.json: canonical, whole or not there, and refused where it was edited, is not consistent, or no plan."""

import json
import math
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli import load_plan, make_plan
from flexmerge_cli.errors import FlexmergeError, SourceError, UsageError
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.family import ROWS_SUFFIX, TASK_NAME, RowMap, Vocabulary
from flexmerge_cli.family.split import Split
from flexmerge_cli.formats.plan_file import MAX_PLAN_BYTES, Plan, is_plan, read_plan, save_plan
from flexmerge_cli.planning.make import replan
from flexmerge_cli.request.plan import OrderSettings

from ..families import ODD, write_family
from ..hostile import SLOW_FILES, json_values, mutations, sealed
from ..program import fails, flexmerge, succeeds, tree


@pytest.mark.parametrize("name", ODD)
def test_a_plan_is_what_was_saved(name, odd_plan, tmp_path):
    path = odd_plan(name)
    plan = read_plan(path)
    save_plan(plan, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "again.json"]
    fields = json.loads(path.read_bytes())
    assert path.read_bytes() == sealed(fields, "sha256")


def test_splits_and_vocabularies_are_looked_through_once():
    """They were for each tensor, and a stranger's plan may have many of both."""
    passes = []

    class Counted(tuple):
        def __iter__(self):
            passes.append(self)
            return super().__iter__()

    rows = RowMap(rows=2, common=((0, 2),), leading="")
    vocabularies = Counted(Vocabulary(tensors=(f"v{n}",), base=rows, tasks=(rows,)) for n in range(9))
    splits = Counted(Split(tensor=f"s{n}", dim=0, parts=2) for n in range(9))
    plan = Plan.model_construct(vocabularies=vocabularies, splits=splits)
    for number in range(9):
        assert plan.vocabulary(f"v{number}{ROWS_SUFFIX}") is vocabularies[number]
        assert plan.split(f"s{number}@part1") is splits[number]
    assert plan.vocabulary("s1") is plan.split("v1") is None
    assert len(passes) == 2


@pytest.mark.parametrize("name", ["plain", "heads", "mixed_dtypes"])
def test_a_plan_in_memory_has_the_sha256_of_the_file_that_is_saved_of_it(name, odd_family, tmp_path):
    """However it was made, also of another plan; a bundle names it by this."""
    made = make_plan(odd_family(name).base, odd_family(name).sources, output=tmp_path / "plan.json", statistics="gram")
    again = replan(made, OrderSettings(blocks="layer"))
    save_plan(again, tmp_path / "again.json")
    for plan, file in ((made, "plan.json"), (again, "again.json")):
        assert plan.sha256 == json.loads((tmp_path / file).read_bytes())["sha256"]
        assert plan == read_plan(tmp_path / file)


def test_a_recipe_gives_the_same_bundle_when_its_plan_is_kept(odd_family, tmp_path):
    folders = odd_family("plain")
    tasks = ", ".join(f"{name}: {path}" for name, path in folders.sources.items())
    (tmp_path / "r.yaml").write_text(
        f"version: 1\nbase: {folders.base}\ntasks: {{{tasks}}}\nmerge: {{method: average}}\n"
    )
    for name in ("first", "second"):
        succeeds("merge", tmp_path / "r.yaml", "--plan", tmp_path / "p.json", "-o", tmp_path / name)
    assert tree(tmp_path / "first") == tree(tmp_path / "second")


def test_a_plan_is_the_same_bytes_from_anywhere(odd_family, odd_plan, tmp_path, monkeypatch):
    """No times, no absolute paths, whatever is the current folder."""
    folders = odd_family("heads")
    monkeypatch.chdir(tmp_path)
    make_plan(folders.base, folders.sources, output=folders.root / "again.json", threads=1)
    assert (folders.root / "again.json").read_bytes() == odd_plan("heads").read_bytes()
    assert str(folders.root) not in odd_plan("heads").read_text()
    (folders.root / "again.json").unlink()


def test_a_family_that_moves_with_its_plan_is_found(odd_family, odd_plan, tmp_path):
    shutil.copytree(odd_family("heads").root, tmp_path / "moved")
    succeeds("merge", tmp_path / "moved/plan.json", "-o", tmp_path / "b")


@pytest.mark.parametrize("change", [
    lambda data: data.replace(b'"near_ties":', b'"near_ties" :'),
    lambda data: data.replace(b'"class":"private"', b'"class":"mergeable"', 1),
    lambda data: data + b"\n",
    lambda data: data.replace(b'"sha256":"', b'"sha256":"f', 1),
    lambda data: data.replace(b'"similarity":', b'"similarity":-', 1),
])  # fmt: skip
def test_an_edited_plan_is_refused(change, odd_plan, tmp_path):
    data = odd_plan("heads").read_bytes()
    (tmp_path / "plan.json").write_bytes(change(data))
    assert change(data) != data
    fails(2, "merge", tmp_path / "plan.json", "-o", tmp_path / "b", says=("was edited: its sha256", "make it again"))
    fails(2, "plan", tmp_path / "plan.json", "-o", tmp_path / "other.json", says="was edited")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "plan.json"]


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"nope", b"\xff\xfe", b'{"format":"flexmerge.plan/2"}', b"[" * 100_000, b"1" * 10**6]
)
def test_what_is_no_plan_is_refused(text, tmp_path):
    (tmp_path / "plan.json").write_bytes(text)
    fails(2, "merge", tmp_path / "plan.json", "-o", tmp_path / "b", says="is not a plan")


def test_a_missing_plan_is_told(tmp_path):
    for place in (tmp_path / "plan.json", tmp_path):
        with pytest.raises(SourceError):
            load_plan(place)
        fails(4, "merge", place, "-o", tmp_path / "b")


def test_only_a_plan_is_replaced(odd_family, odd_plan, tmp_path):
    """`--force` with a slip of the hand must not cost a checkpoint."""
    folders = odd_family("plain")
    config = tmp_path / "config.json"
    config.write_text("{}")
    fails(2, "plan", *folders.arguments, "-o", config, says="exists")
    fails(2, "plan", *folders.arguments, "-o", config, "--force", says="is not a plan of flexmerge")
    fails(2, "plan", *folders.arguments, "-o", folders.base / "model.safetensors", "--force", says="lies in the input")
    fails(2, "plan", *folders.arguments, "-o", tmp_path, "--force", says="is not a plan")
    assert config.read_text() == "{}" and not is_plan(config) and is_plan(odd_plan("plain"))
    config.unlink()
    succeeds("plan", *folders.arguments, "-o", config)
    succeeds("plan", *folders.arguments, "-o", config, "--force")


def seal(fields, path):
    path.write_bytes(sealed(fields, "sha256"))
    return path


def names_of_tasks(fields, name):
    fields["tasks"][0]["name"] = name


def tie(fields, target):
    fields["tensors"][-1].update({"class": "tied", "reason": target})


EMPTY = {"name": "x", "tensors": [], "elements": 0}


# A sound sha256, and what does not fit together.
INCONSISTENT = {
    "a task that is a path": (lambda f: names_of_tasks(f, "../x"), "cannot be a task's"),
    "a task by the name of all": (lambda f: names_of_tasks(f, "ALL"), "cannot be a task's"),
    "tasks out of order": (lambda f: f["tasks"].reverse(), "out of order"),
    "no tasks": (lambda f: f.update(tasks=[]), "out of order"),
    "a tensor twice": (lambda f: f["tensors"].append(f["tensors"][0]), "not unique"),
    "one digest too few": (lambda f: f["tensors"][0]["digests"].pop(), "does not have one value per task"),
    "a gram that is not symmetric": (lambda f: f["tensors"][0]["gram"][1].__setitem__(0, 0.5), "is not symmetric"),
    "a negative energy": (lambda f: f["tensors"][0]["gram"][1].__setitem__(1, -0.5), "is not symmetric"),
    "text that no file can hold": (lambda f: f["base"].update(source="a\0b"), "no file can hold"),
    "half a character": (lambda f: f["tasks"][0]["names"].update(a=chr(0xD800)), "no file can hold"),
    "a gram that is not square": (lambda f: f["tensors"][0]["gram"][1].pop(), "does not have one value per task"),
    "an unknown dtype": (lambda f: f["tensors"][0].update(dtype="F8_E4M3"), "unknown dtype"),
    "too many axes": (lambda f: f["tensors"][0].update(shape=[1] * 100), "too many axes"),
    "a negative axis": (lambda f: f["tensors"][0].update(shape=[-1]), "tensors.0.shape"),
    "same as a later task": (lambda f: f["tensors"][0].update(same=[1, 1, 2, 3]), "a wrong `same`"),
    "same as one of other bits": (lambda f: f["tensors"][0].update(same=[0, 0, 2, 3]), "a wrong `same`"),
    "a merge of what is no group": (lambda f: f["order"].pop(0), "does not follow from those before it"),
    "a merge with itself": (lambda f: f["order"][0].update(right=f["order"][0]["left"]), "does not follow"),
    "a merge of no block": (lambda f: f["order"][0].update(block="nowhere"), "does not follow"),
    "a block twice": (lambda f: f["blocks"].append(f["blocks"][0]), "exactly once"),
    "a block without tensors": (lambda f: f["blocks"].append(EMPTY), "a block is empty"),
    "a mergeable tensor in no block": (lambda f: f["blocks"][0]["tensors"].pop(), "exactly once"),
    "a private one in a block": (lambda f: f["blocks"][0]["tensors"].append("classifier.bias"), "exactly once"),
    "an integer that merges": (lambda f: f["tensors"][0].update(dtype="I64"), "cannot be mergeable"),
    "merging without a gram": (lambda f: f["tensors"][0].update(gram=None), "cannot be mergeable"),
    "base-only, yet in tasks": (lambda f: f["tensors"][-1].update({"class": "base-only"}), "is not `base-only`"),
    "tied to nothing": (lambda f: tie(f, "nowhere"), "is not tied to a tensor of its form"),
    "tied to another form": (lambda f: tie(f, "pooler.dense.weight"), "is not tied to a tensor of its form"),
    "tied to itself": (lambda f: tie(f, f["tensors"][-1]["name"]), "is not tied to a tensor of its form"),
    "two names of a task that are one": (
        lambda f: f["tasks"][0]["names"].update({"pooler.dense.weight": "embeddings.LayerNorm.weight"}), "have one name"
    ),
    "an unknown key": (lambda f: f.update(extra=1), "extra"),
    "a missing key": (lambda f: f.pop("near_ties"), "near_ties"),
    "an unknown class": (lambda f: f["tensors"][0].update({"class": "other"}), "class"),
    "an unknown linkage": (lambda f: f["settings"].update(linkage="ward"), "linkage"),
    "a similarity that is no number": (lambda f: f["order"][0].update(similarity="high"), "similarity"),
}  # fmt: skip


@pytest.mark.parametrize("what", INCONSISTENT)
def test_a_plan_that_does_not_fit_together_is_refused(what, odd_plan, tmp_path):
    change, says = INCONSISTENT[what]
    fields = json.loads(odd_plan("heads").read_bytes())
    change(fields)
    fails(2, "merge", seal(fields, tmp_path / "plan.json"), "-o", tmp_path / "b", says=(says, "make it again"))
    assert not (tmp_path / "b").exists()


def test_no_number_of_a_plan_is_nan(odd_plan, tmp_path):
    data = odd_plan("heads").read_bytes().replace(b'"base_energy":0.0', b'"base_energy":NaN', 1)
    (tmp_path / "plan.json").write_bytes(sealed(json.loads(data), "sha256"))
    fails(2, "merge", tmp_path / "plan.json", "-o", tmp_path / "b")


def test_a_plan_of_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "plan.json").open("wb") as file:
        file.truncate(MAX_PLAN_BYTES + 1)
    with pytest.raises(UsageError, match="too large"):
        read_plan(tmp_path / "plan.json")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Three tasks, with a constant, a private, a tied and a base-only tensor."""
    models = ODD["tied"]()
    del models.tasks["task3"]
    keep = ("embed_tokens.weight", "lm_head.weight", "encoder.layer.0.intermediate.dense.weight", "pooler.dense.weight")
    for state in [models.base, *models.tasks.values()]:
        for name in set(state) - set(keep):
            del state[name]
    for state in models.tasks.values():
        state["pooler.dense.weight"] = models.base["pooler.dense.weight"] + 1
        state["classifier.bias"] = state["encoder.layer.0.intermediate.dense.weight"][0].clone()
    models.base["extra.weight"] = models.base["pooler.dense.weight"] + 2
    folders = write_family(tmp_path_factory.mktemp("tiny"), models)
    succeeds("plan", *folders.arguments, "-o", folders.root / "plan.json")
    assert {t.class_ for t in load_plan(folders.root / "plan.json").tensors} == set(TensorClass)
    return folders


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW_FILES)
@given(st.data())
def test_mutated_plans_end_in_a_clean_error_or_are_plans(tiny, tmp_path, data):
    """Read, priced, planned again and merged; nothing is ever written outside the bundle's place."""
    shutil.rmtree(tiny.root / "made", ignore_errors=True)
    (tiny.root / "other.json").unlink(missing_ok=True)
    path = tiny.root / "mutated.json"
    sound = (tiny.root / "plan.json").read_bytes()
    if data.draw(st.integers(0, 3)) == 0:
        path.write_bytes(data.draw(mutations(sound)))
    else:
        seal(data.draw(json_values(json.loads(sound))), path)
    before = set(tree(tiny.root))
    method = data.draw(
        st.sampled_from([(), ("--method", "average"), ("--method", "emr"), ("--method", "ties", "--size", "2x")])
    )
    for arguments in (
        ("merge", path, *method, "-o", tiny.root / "never", "--dry-run"),
        ("plan", path, "--linkage", "average", "-o", tiny.root / "other.json"),
        ("merge", path, *method, "-o", tiny.root / "made"),
    ):
        result = flexmerge(*arguments)
        assert result.code in (0, 2, 3, 4, 6) or "no space at" in result.err
    written = set(tree(tiny.root)) - before
    assert all(name == "other.json" or name.startswith("made/") for name in written), written


@settings(max_examples=200, deadline=None, suppress_health_check=SLOW_FILES)
@given(st.data())
def test_a_plan_that_is_read_is_consistent(tiny, tmp_path, data):
    """Whatever passes the door has what all that comes after takes for granted."""
    path = tmp_path / "plan.json"
    seal(data.draw(json_values(json.loads((tiny.root / "plan.json").read_bytes()), changes=2)), path)
    try:
        plan: Plan = read_plan(path)
    except FlexmergeError as error:
        assert error.exit_code == 2
        return
    count = len(plan.tasks)
    assert all(TASK_NAME.fullmatch(name) for name in plan.task_names)
    for tensor in plan.tensors:
        assert len(tensor.digests) == len(tensor.same) == count
        for task in tensor.present:
            assert tensor.digests[tensor.same[task]] == tensor.digests[task]
            assert math.prod(tensor.shape_of(task)) >= 0
    assert sorted(n for b in plan.blocks for n in b.tensors) == sorted(
        t.name for t in plan.tensors if t.class_ == "mergeable"
    )
    plan.merges()
    plan.task_energy()
