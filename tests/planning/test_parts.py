"""`plan --part` and `--join`: the plan of one process, and no plan of parts that are not all parts of one."""

import json
import shutil
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flexmerge_cli.planning import parts
from flexmerge_cli.request.part import Share

from ..adapters import LORA
from ..adapters import make as make_adapters
from ..families import ODD, plain, write_family
from ..hostile import sealed
from ..odd_values import odd_files
from ..program import Child, fails, flexmerge, succeeds


def in_parts(sources, count, folder, *options):
    """The paths of all parts."""
    folder.mkdir(exist_ok=True)
    places = [folder / f"part{number}.json" for number in range(1, count + 1)]
    for number, place in enumerate(places, 1):
        succeeds("plan", *sources, *options, "--part", f"{number}/{count}", "-o", place, "-q", "--force")
    return places


def assert_joined_is_whole(sources, count, root, *options):
    succeeds("plan", *sources, *options, "-o", root / "whole.json", "-q", "--force")
    places = in_parts(sources, count, root / "parts", *options)
    succeeds("plan", "--join", *reversed(places), "-o", root / "joined.json", "-q", "--force")
    assert (root / "joined.json").read_bytes() == (root / "whole.json").read_bytes()


@given(st.lists(st.integers(0, 1 << 40), max_size=30), st.integers(1, 40))
def test_each_thing_is_of_one_part_and_parts_are_of_about_equal_size(sizes, count):
    places = [Share(number, count).places(sizes) for number in range(1, count + 1)]
    assert [place for part in places for place in part] == list(range(len(sizes)))
    for part in places:
        # Half of the first and of the last may lie outside of an equal share.
        assert sum(sizes[place] for place in part) <= -(-sum(sizes) // count) + max(sizes, default=0)


@pytest.mark.parametrize(
    ("name", "count", "options"),
    [
        ("mixed_dtypes", 3, ()),
        ("resized_vocabulary", 2, ("--similarity", "sign", "--statistics", "gram")),
        ("constants", 1, ()),
        ("doubles", 20, ("--private", "*bias")),
        ("tied", 2, ("--blocks", "layer", "--linkage", "average")),
        ("outliers", 3, ()),
    ],
)
def test_joined_parts_are_the_plan_of_one_process(name, count, options, tmp_path):
    assert_joined_is_whole(write_family(tmp_path, ODD[name]()).arguments, count, tmp_path, *options)


def test_kept_and_merged_adapters_are_joined_too(tmp_path):
    configs = {name: LORA(r=4, target_modules=["q_proj", "v_proj"]) for name in ("a", "b")}
    made = make_adapters(tmp_path / "family", "llama", configs)
    sources = ["--base", made.base, "--tasks", made.tasks, f"--task=whole={made.full('whole', 1)}"]
    assert_joined_is_whole(sources, 2, tmp_path)
    assert_joined_is_whole(sources, 2, tmp_path, "--adapters", "merge")


def test_values_that_are_not_finite_are_told_by_the_join_as_by_one_process(tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=2))
    weights = folders.tasks["task0"] / "model.safetensors"
    state = load_file(weights)
    name = next(name for name, tensor in state.items() if tensor.ndim == 2)
    state[name][1, 2] = torch.nan
    save_file(state, weights)
    whole = fails(3, "plan", *folders.arguments, "-o", tmp_path / "p.json", says="not finite")
    joined = fails(3, "plan", "--join", *in_parts(folders.arguments, 3, tmp_path / "parts"), "-o", tmp_path / "p.json")
    assert joined.err == whole.err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A family and its three parts. No test writes here."""
    root = tmp_path_factory.mktemp("parts")
    folders = write_family(root, plain(num_tasks=3))
    return folders, in_parts(folders.arguments, 3, root / "parts")


def test_parts_are_made_at_the_same_time_and_a_killed_one_again(made, tmp_path):
    folders, whole = made
    places = [tmp_path / f"part{number}.json" for number in (1, 2, 3)]
    commands = [
        ("plan", *folders.arguments, "--part", f"{number}/3", "-o", place, "-q")
        for number, place in enumerate(places, 1)
    ]
    children = [Child(*command) for command in commands]
    children[1].send(9)
    codes = [child.wait()[0] for child in children]
    assert codes[0] == codes[2] == 0
    if codes[1]:
        fails(2, "plan", "--join", *(place for place in places if place.exists()), "-o", tmp_path / "p", says="2/3")
        succeeds(*commands[1])
    assert [place.read_bytes() for place in places] == [place.read_bytes() for place in whole]


def test_what_are_not_all_parts_of_one_plan_is_refused_by_name(made, tmp_path, monkeypatch):
    folders, (one, two, three) = made

    def refused(*places, says, code=2):
        fails(code, "plan", "--join", *places, "-o", tmp_path / "p.json", says=says)
        assert not (tmp_path / "p.json").exists()

    def other(number, *options, sources=folders.arguments, count=3):
        place = tmp_path / "other.json"
        succeeds("plan", *sources, *options, "--part", f"{number}/{count}", "-o", place, "-q", "--force")
        return place

    refused(one, three, says="lacks 1 of 3 parts: 2/3")
    refused(one, two, three, two, says=("part2.json and", "are both part 2/3"))
    refused(one, other(2, "--statistics", "gram"), three, says=("other.json", "--statistics is gram here, all there"))
    refused(one, other(2, count=4), three, says=("other.json", "the number of parts is 4 here, 3 there"))
    swapped = ["--base", folders.base, f"--task=task0={folders.tasks['task1']}", *folders.arguments[4:]]
    refused(one, other(2, sources=swapped), three, says=("other.json", "task"))
    alone = ["--base", folders.base, f"--task=task0={folders.tasks['task0']}"]
    refused(one, other(2, sources=alone), three, says=("other.json", "`task1` is missing here"))
    edited = tmp_path / "edited.json"
    edited.write_text(two.read_text().replace('"base_energy":', '"base_energy": 1', 1))
    refused(one, edited, three, says="edited.json was edited")
    refused(one, folders.base / "model.safetensors", three, says="is not a part of a plan")
    with monkeypatch.context() as patch:
        patch.setattr(parts, "GENERATOR", "flexmerge 9.9")
        newer = other(2)
    refused(one, newer, three, says=("other.json was made by flexmerge 9.9", "this is"))
    fails(2, "plan", *folders.arguments, "--join", one, two, three, "-o", tmp_path / "p.json", says="beside --join")
    fails(
        2, "plan", *folders.arguments, "--part", "1/3", "--html", "a.html", "-o", tmp_path / "p", says="beside --part"
    )
    for word in ("0/3", "4/3", "3", "1/0", "-1/3", "1/3/2"):
        fails(2, "plan", *folders.arguments, f"--part={word}", "-o", tmp_path / "p.json", says=f"--part {word}")


def test_parts_of_a_plan_or_of_sources_that_have_changed_are_refused(made, tmp_path):
    folders, places = made
    succeeds("plan", "--join", *places, "-o", tmp_path / "plan.json", "-q")
    fails(2, "plan", tmp_path / "plan.json", "--part", "1/2", "-o", tmp_path / "part", says="a new plan")
    fails(2, "plan", *folders.arguments, "--part", "1/2", "-o", tmp_path / "plan.json", "--force", says="is not")
    moved = tmp_path / "family"
    shutil.copytree(folders.root, moved)
    sources = ["--base", moved / "base", "--tasks", moved / "tasks"]
    again = in_parts(sources, 2, tmp_path / "again")
    config = moved / "tasks" / "task1" / "model.safetensors"
    state = load_file(config)
    save_file(state | {"new.weight": torch.ones(3)}, config)
    fails(3, "plan", "--join", *again, "-o", tmp_path / "p.json", says="task `task1` has other tensors")


def test_a_part_says_what_it_measured(made, tmp_path):
    folders, _ = made
    found = succeeds("plan", *folders.arguments, "--part", "2/3", "-o", tmp_path / "p", "--json").json
    part = json.loads((tmp_path / "p").read_text())
    assert found["part"] == "2/3" and found["tensors"] == len(part["measures"]) > 0


def test_a_strangers_part_with_odd_values_is_refused_in_plain_words(made, tmp_path):
    """The join computed with whatever was there: coding errors below 0 and a skew Gram matrix were called bugs."""
    one, two, three = made[1]
    sound = json.loads(two.read_bytes())
    place = next(n for n, measure in enumerate(sound["measures"]) if measure["gram"] and measure["coding"])
    other = tmp_path / "odd.json"

    def refused(fields):
        other.write_bytes(sealed(fields, "sha256"))
        result = flexmerge("plan", "--join", one, other, three, "-o", tmp_path / "p.json", "--force")
        assert (result.code in (2, 3) and str(other) in result.err) or "the parts make no sound plan" in result.err

    for key, value in {
        "gram": [[1.0, 2.0, 3.0]] * 3, "same": [0, 2, 2], "not_finite": [[7, 0]], "digests": ["0" * 32],
        "coding": {"base": {"2": -1.0}, "average": {}, "ratio": {}}, "base_energy": 1e308,
    }.items():  # fmt: skip
        fields = json.loads(two.read_bytes())
        fields["measures"][place][key] = value
        refused(fields)
    for _, data in islice(odd_files(two.read_bytes(), "sha256", seed=1), 6):
        other.write_bytes(data)
        flexmerge("plan", "--join", one, other, three, "-o", tmp_path / "p.json", "--force")  # which fails of a bug
