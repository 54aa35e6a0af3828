"""A family on disk and its plan: every tensor of every file in exactly one class, and listed."""

import json

import pytest
import torch

from flexmerge_cli import load_plan, make_plan, open_bundle, verify
from flexmerge_cli.errors import DataError, SourceError, UsageError
from flexmerge_cli.family.family import check_task_names, find_tasks
from flexmerge_cli.planning.sources import open_family
from flexmerge_cli.request.plan import PlanRequest

from ..families import (
    ODD,
    Models,
    assert_same_state,
    encoder,
    normal,
    plain,
    same_bits,
    tuned,
    write_checkpoint,
    write_family,
)
from ..program import fails, succeeds

HEAD = {"classifier.weight": "private", "classifier.bias": "private"}

# What is not mergeable in each odd family.
CLASSES = {
    "plain": {}, "bf16": {}, "fp16": {}, "bf16_of_fp32": {}, "mixed_dtypes": {}, "doubles": {}, "duplicates": {},
    "zero_task": {}, "one_task": {}, "two_tasks": {}, "small_shapes": {}, "outliers": {},
    "heads": HEAD, "wrapped_tasks": HEAD, "wrapped_base": HEAD,
    "buffers": {"embeddings.position_ids": "constant", "encoder.count": "private", "encoder.mask": "private"},
    "running_statistics": {
        "bn1.running_mean": "private", "bn1.running_var": "private", "bn1.num_batches_tracked": "constant",
        "fc.weight": "private", "fc.bias": "private",
    },
    "resized_vocabulary": {},
    "reshaped": {"classifier.weight": "private", "pooler.dense.weight": "private"},
    "constants": {"embeddings.word_embeddings.weight": "constant", "pooler.dense.weight": "constant"},
    "base_only": {"lm_predictions.dense.weight": "base-only"},
    "all_zero": dict.fromkeys(encoder(), "constant"),
    "private_only": dict.fromkeys(encoder(), "constant") | HEAD | {"position_ids": "private"},
    "confusing_names": {"model.pooler.dense.weight": "private"},
    "tied": {"lm_head.weight": "tied"},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_every_tensor_is_in_its_class(name, odd_family, odd_plan):
    expected = dict(CLASSES[name])
    if name == "small_shapes":
        # An empty tensor is the same in every task.
        expected = {"blocks.0.mlp.bias": "constant", "blocks.1.attn.weight": "constant"}
    found = load_plan(odd_plan(name))
    assert {t.name: t.class_ for t in found.tensors if t.class_ != "mergeable"} == expected
    models = odd_family(name).models
    for task, (label, state) in enumerate(sorted(models.tasks.items())):
        assert {found.own_name(task, t.name) for t in found.tensors if task in t.present} == set(state), label
    names = {t.name for t in found.tensors}
    assert set(models.base) <= names


def test_what_the_plan_prints_counts_and_lists_every_class(odd_family, tmp_path):
    folders = odd_family("running_statistics")
    result = succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json", "--json").json["classes"]
    assert {kind: found["tensors"] for kind, found in result.items()} == {
        "base-only": 0, "tied": 0, "constant": 1, "private": 4, "mergeable": 5,
    }  # fmt: skip
    listed = {item["name"]: item["why"] for item in result["private"]["names"]}
    assert listed == {
        "bn1.running_mean": "running statistic", "bn1.running_var": "running statistic",
        "fc.weight": "task head", "fc.bias": "task head",
    }  # fmt: skip
    assert sum(found["bytes"] for found in result.values()) == sum(
        value.numel() * value.element_size() for state in folders.models.tasks.values() for value in state.values()
    )
    text = succeeds("plan", *folders.arguments, "-o", tmp_path / "again.json").out
    assert "bn1.running_mean (running statistic)" in text


def test_heads_merge_where_that_is_asked_for(tmp_path):
    models = plain(num_tasks=3)
    for number, state in enumerate([models.base, *models.tasks.values()]):
        state["classifier.weight"] = normal(number, 3, 8)
    folders = write_family(tmp_path, models)
    for options, expected in (
        ((), "private"),
        (("--merge-heads",), "mergeable"),
        (("--private", "classifier*"), "private"),
    ):
        succeeds("plan", *folders.arguments, *options, "-o", tmp_path / "plan.json", "--force")
        assert load_plan(tmp_path / "plan.json").tensor("classifier.weight").class_ == expected


def test_private_patterns_keep_tensors_apart(tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=3))
    succeeds(
        "plan",
        *folders.arguments,
        "--private",
        "encoder.layer.1.*",
        "--private",
        "pooler*",
        "-o",
        tmp_path / "plan.json",
    )
    private = {t.name for t in load_plan(tmp_path / "plan.json").tensors if t.class_ == "private"}
    assert private == {name for name in encoder() if name.startswith(("encoder.layer.1.", "pooler"))}


def tied_in_bin(shared):
    """Whether embedding and head share storage, per task."""
    base = encoder() | {"lm_head.weight": normal(5, 11, 8)}
    tasks = {}
    for number, is_shared in enumerate(shared):
        state = tuned(base, number + 1)
        state["lm_head.weight"] = state["embeddings.word_embeddings.weight"]
        if not is_shared:
            state["lm_head.weight"] = state["lm_head.weight"].clone()
        tasks[f"task{number}"] = state
    return Models(base=base, tasks=tasks)


@pytest.mark.parametrize(
    ("shared", "expected"), [((True, True), "tied"), ((True, False), "mergeable"), ((False, False), "mergeable")]
)
def test_shared_storage_of_a_bin_is_tied_if_it_is_so_in_every_task(shared, expected, tmp_path):
    models = tied_in_bin(shared)
    folders = write_family(tmp_path, models, layout="bin")
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").tensor("lm_head.weight").class_ == expected
    for method in ((), ("--method", "average")):
        bundle = tmp_path / f"bundle{len(method)}"
        succeeds("merge", tmp_path / "plan.json", *method, "-o", bundle)
        view = open_bundle(bundle).view("task1")
        same = same_bits(view["lm_head.weight"], view["embeddings.word_embeddings.weight"])
        assert same == (expected == "tied" or not method)
        if expected == "tied":
            assert view["lm_head.weight"].data_ptr() == view["embeddings.word_embeddings.weight"].data_ptr()


def test_a_head_that_the_config_ties_is_so_only_if_its_bits_are(tmp_path):
    models = ODD["tied"]()
    models.tasks["task2"]["lm_head.weight"][3, 3] += 1e-6
    folders = write_family(tmp_path, models)
    made = make_plan(folders.base, folders.sources)
    assert made.tensor("lm_head.weight").class_ == "mergeable"


def test_a_head_that_the_config_ties_may_be_absent(tmp_path):
    models = ODD["tied"]()
    for state in models.tasks.values():
        del state["lm_head.weight"]
    folders = write_family(tmp_path, models)
    assert make_plan(folders.base, folders.sources).tensor("lm_head.weight").class_ == "base-only"


# What does not fit.


def test_a_fine_tune_of_another_architecture_is_refused_and_all_of_them_at_once(tmp_path):
    models = plain(num_tasks=4)
    models.tasks["task1"] = {f"other.{name}": normal(0, 3, 3) for name in models.base}
    models.tasks["task3"] = encoder(width=16)
    models.configs = {"task1": {"model_type": "gpt2"}}
    folders = write_family(tmp_path, models)
    result = fails(3, "plan", *folders.arguments, "-o", tmp_path / "plan.json", says="not of one architecture")
    assert "task `task1` (gpt2, the base is ?): 0 of its 15 tensors are in the base" in result.err
    assert "15 are missing" in result.err
    assert "task `task3`" in result.err and "is [11, 16], [11, 8] in the base" in result.err
    assert "task0" not in result.err.replace(str(tmp_path), "") and "task2" not in result.err
    assert not (tmp_path / "plan.json").exists()


def test_half_of_the_tasks_own_tensors_are_enough_and_fewer_are_not(tmp_path):
    """A task may be one part of the base, and have parts of its own."""
    base = {f"layer.{n}.mlp.weight": normal(n, 3) for n in range(8)}
    for own, code in ((2, 0), (3, 3)):
        task = {f"layer.{n}.mlp.weight": normal(n, 3) + 1 for n in range(2)}
        task |= {f"other.{n}.weight": normal(n, 5) for n in range(own)}
        folders = write_family(tmp_path / str(own), Models(base=base, tasks={"a": task}))
        arguments = ("plan", *folders.arguments, "-o", tmp_path / str(own) / "plan.json")
        if code:
            fails(code, *arguments, says="2 of its 5 tensors are in the base's 8")
        else:
            succeeds(*arguments)


def test_names_that_fit_two_parts_of_the_base_are_refused_with_both(tmp_path):
    tower = {f"layers.{n}.weight": normal(n, 3) for n in range(4)}
    base = {f"{part}.{name}": value + 1 for part in ("query_encoder", "doc_encoder") for name, value in tower.items()}
    folders = write_family(tmp_path, Models(base=base, tasks={"a": tower}))
    fails(3, "plan", *folders.arguments, "-o", tmp_path / "plan.json", says=("`doc_encoder.*`", "`query_encoder.*`"))


def test_much_that_is_missing_in_the_base_beside_much_that_only_the_base_has_is_warned_of(tmp_path):
    body = {f"layers.{n}.weight": normal(n, 3, 3) for n in range(6)}
    base = body | {f"model.first.{n}.weight": normal(n, 4, 4) for n in range(4)}
    renamed = {name: value + 0.1 for name, value in body.items()}
    renamed |= {f"model.second.{n}.weight": normal(n, 4, 4) for n in range(4)}
    folders = write_family(tmp_path, Models(base=base, tasks={"a": renamed, "b": base}))
    result = succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    assert "task `a`: 4 of its 10 tensors" in result.err and "`model.second.0.weight`" in result.err
    assert "`model.first.0.weight`" in result.err and "task `b`: " not in result.err
    head = body | {"classifier.weight": normal(0, 9, 9)}
    folders = write_family(
        tmp_path / "head", Models(base=body | {"lm_head.weight": normal(1, 1, 3)}, tasks={"a": head})
    )
    assert "of its 7 tensors" not in succeeds("plan", *folders.arguments, "-o", tmp_path / "head.json").err


@pytest.mark.parametrize("role", ["base", "unified", "mask.task0", "gamma", "codes.x", "rows"])
def test_names_of_parts_are_refused(role, tmp_path):
    """`w@mask.task0` beside a masked `w`: a reader could not tell them apart."""
    models = plain(num_tasks=2)
    models.tasks["task1"][f"pooler.dense.weight@{role}"] = normal(0, 2)
    folders = write_family(tmp_path, models)
    fails(3, "plan", *folders.arguments, "-o", tmp_path / "plan.json", says=f"`pooler.dense.weight@{role}` of")


def test_an_at_sign_alone_is_a_name_like_another(tmp_path):
    models = plain(num_tasks=2)
    for number, state in enumerate([models.base, *models.tasks.values()]):
        state["layer.0.mlp@masked.weight"] = normal(number, 20)
    folders = write_family(tmp_path, models)
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")


# NaN and Inf.


@pytest.mark.parametrize("where", ["base", "task1"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_with_its_place(where, bad, tmp_path):
    models = plain(num_tasks=3)
    state = models.base if where == "base" else models.tasks[where]
    state["encoder.layer.1.output.dense.weight"][3, 7] = bad
    models.tasks["task2"]["pooler.dense.weight"][0, 0] = bad
    folders = write_family(tmp_path, models)
    who = "the base" if where == "base" else "task `task1`"
    fails(
        3, "plan", *folders.arguments, "-o", tmp_path / "plan.json",
        says=(
            f"{who} has NaN or Inf in `encoder.layer.1.output.dense.weight` at [3, 7]",
            "task `task2` has NaN or Inf in `pooler.dense.weight` at [0, 0]",
        ),
    )  # fmt: skip
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 3e38), (torch.float64, 1e300)])
def test_values_too_large_to_be_compared_are_told(dtype, value, tmp_path):
    """Each is finite; their difference, or their square, is not, and no plan can hold it."""
    models = plain(dtype, num_tasks=2)
    models.base["pooler.dense.weight"][0, 0] = value
    models.tasks["task1"]["pooler.dense.weight"][0, 0] = -value
    folders = write_family(tmp_path, models)
    fails(
        3, "plan", *folders.arguments, "-o", tmp_path / "plan.json",
        says="`pooler.dense.weight` holds values, or differs from the base's by some, that float32 cannot hold",
    )  # fmt: skip


def test_nan_in_a_tensor_that_all_share_is_a_constant_and_listed(tmp_path):
    models = plain(num_tasks=3)
    for state in models.tasks.values():
        state["pooler.dense.weight"] = torch.full((8, 8), float("nan"))
    folders = write_family(tmp_path, models)
    result = succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    assert "not finite and are stored unchanged: pooler.dense.weight" in result.err


# Names of tasks.


@pytest.mark.parametrize("name", [
    "../x", "a/b", "", ".", "..", ".hidden", "-x", "_x", "a b", "all", "ALL", "All", "x" * 65, "ä", "a\n",
    "a\0", "a:b", "a+b",
])  # fmt: skip
def test_a_name_that_cannot_be_a_file_everywhere_is_refused(name):
    with pytest.raises(UsageError, match="cannot be a task's name"):
        check_task_names([name])


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "x" * 64, "1.0", "all2", "base"])
def test_plain_names_are_taken(name):
    check_task_names([name])


def test_two_tasks_of_one_name_are_refused_whatever_their_case():
    with pytest.raises(UsageError, match="two tasks have the same name: `sst2` and `SST2`"):
        check_task_names(["sst2", "cola", "SST2"])


def test_a_folder_of_tasks_names_what_else_is_there(tmp_path):
    write_checkpoint(tmp_path / "b", encoder())
    write_checkpoint(tmp_path / "a", encoder(), layout="bin")
    write_checkpoint(tmp_path / "steps/checkpoint-100", encoder())
    write_checkpoint(tmp_path / "unclear", encoder())
    (tmp_path / "unclear/model.safetensors").rename(tmp_path / "unclear/one.safetensors")
    (tmp_path / "unclear/two.safetensors").write_bytes(b"")
    (tmp_path / "linked").symlink_to(tmp_path / "nowhere")
    for name in ("logs", ".git", "logs/events"):
        (tmp_path / name).mkdir()
    for name in ("notes.txt", "lone.safetensors"):
        (tmp_path / name).write_text("")
    found = find_tasks(tmp_path)
    assert list(found.models) == ["a", "b"]
    assert found.others == {
        "logs": "no model",
        "lone.safetensors": "a weight file: --task NAME=…/lone.safetensors takes it",
        "notes.txt": "a file",
    }
    assert found.unfinished == {
        "linked": "is a link that leads nowhere",
        "steps": "has no weights of its own; look in checkpoint-100/",
        "unclear": "holds one.safetensors, two.safetensors, and it is unclear which of them is the model",
    }
    with pytest.raises(SourceError, match="no folder"):
        find_tasks(tmp_path / "nowhere")


def test_all_missing_sources_are_told_at_once(tmp_path):
    with pytest.raises(SourceError) as raised:
        open_family(PlanRequest(base="nobase", tasks={"a": "noa", "b": "nob"}, relative_to=tmp_path))
    assert all(name in raised.value.message for name in ("nobase", "noa", "nob"))


def test_tasks_are_in_code_point_order_of_name(tmp_path):
    models = plain(num_tasks=3)
    models.tasks = {"b": models.tasks["task0"], "B": models.tasks["task1"], "10": models.tasks["task2"]}
    folders = write_family(tmp_path, models)
    models.tasks["c"] = models.tasks.pop("b")
    with pytest.raises(UsageError):  # b and B
        make_plan(folders.base, folders.sources)
    folders = write_family(tmp_path / "other", models)
    assert make_plan(folders.base, folders.sources).task_names == ("10", "B", "c")


def test_a_task_that_is_no_fine_tune_of_the_base_is_warned_of(tmp_path):
    models = plain(num_tasks=3)
    models.tasks["task1"] = encoder(seed=9)
    models.configs = {"task1": {"_name_or_path": "org/true-base"}}
    folders = write_family(tmp_path, models)
    result = succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    assert "task `task1` is probably not a fine-tune of this base" in result.err and "`org/true-base`" in result.err
    assert "task `task0` is probably" not in result.err


def test_nothing_is_read_of_weights_before_headers_fit(tmp_path, monkeypatch):
    """A misfit is told from headers: weights that are a hole in a file of terabytes do not matter."""
    models = plain(num_tasks=2)
    folders = write_family(tmp_path, models)
    models.tasks["task1"] = {"other.weight": normal(0, 3)}
    write_checkpoint(folders.tasks["task1"], models.tasks["task1"])

    def never(*_arguments):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("flexmerge_cli.checkpoint.reader.Reader.read", never)
    with pytest.raises(DataError, match="not of one architecture"):
        make_plan(folders.base, folders.sources)


# Ties, task by task.


def with_head(state, *, tied):
    """embed_tokens and, unless it is tied, a head of its own."""
    state = dict(state)
    state["embed_tokens.weight"] = state.pop("embeddings.word_embeddings.weight")
    if not tied:
        state["lm_head.weight"] = state["embed_tokens.weight"] + 0.05 * normal(len(state), 11, 8)
    return state


def family_of_ties(root, base_tied, tasks_tied, *, stored=(), words=True):
    """Models whose configs tie or do not, and with `words` say so; of `stored` a tied head is in the file, too."""
    base = encoder()
    states = {"base": with_head(base, tied=base_tied)}
    ties = {"base": base_tied}
    for number, is_tied in enumerate(tasks_tied):
        states[f"task{number}"] = with_head(tuned(base, number + 1), tied=is_tied)
        ties[f"task{number}"] = is_tied
    for name, state in states.items():
        if name in stored and ties[name]:
            state["lm_head.weight"] = state["embed_tokens.weight"].clone()
        folder = root / "base" if name == "base" else root / "tasks" / name
        write_checkpoint(folder, state)
        config = {"model_type": "test"} | ({"tie_word_embeddings": ties[name]} if words else {})
        (folder / "config.json").write_text(json.dumps(config))
    return states


@pytest.mark.parametrize(
    ("base_tied", "tasks_tied", "stored", "expected"),
    [
        (True, (True, True), (), None),
        (True, (True, True), ("task0",), "tied"),
        (True, (True, True), ("base", "task0", "task1"), "tied"),
        (True, (False, False), (), "mergeable"),
        (True, (False, False), ("base",), "mergeable"),
        (True, (True, False), (), "private"),
        (True, (True, False), ("base", "task0"), "mergeable"),
        (True, (True, False), ("task0",), "mergeable"),
        (False, (True, True), (), "base-only"),
        (False, (True, False), (), "private"),
        (False, (True, False), ("task0",), "mergeable"),
        (False, (True, True), ("task1",), "tied"),
        (False, (False, False), (), "mergeable"),
    ],
)
def test_ties_of_base_and_tasks(base_tied, tasks_tied, stored, expected, tmp_path):
    states = family_of_ties(tmp_path, base_tied, tasks_tied, stored=stored)
    succeeds("plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "plan.json")
    classes = {tensor.name: tensor.class_ for tensor in load_plan(tmp_path / "plan.json").tensors}
    assert classes.get("lm_head.weight") == expected
    for options in ((), ("--method", "average", "--size", "1x")):
        succeeds("merge", tmp_path / "plan.json", *options, "-o", tmp_path / f"bundle{len(options)}")
        assert verify(tmp_path / f"bundle{len(options)}", decode=True).bad == {}
        for task in (name for name in states if name != "base"):
            view = open_bundle(tmp_path / f"bundle{len(options)}").view(task)
            assert sorted(view) == sorted(states[task]), "as the source had it"
            if not options:
                assert_same_state(view, states[task])
            elif expected == "tied" and "lm_head.weight" in view:
                assert same_bits(view["lm_head.weight"], view["embed_tokens.weight"])
            elif expected == "mergeable":
                base = states["base"].get("lm_head.weight", states["base"]["embed_tokens.weight"])
                heads = [states[name]["lm_head.weight"] for name in states if name != "base"]
                mean = torch.stack([head - base for head in heads]).double().mean(0).float()
                torch.testing.assert_close(view["lm_head.weight"], base + mean, rtol=0, atol=1e-6)


def test_a_base_that_does_not_say_that_it_ties_has_no_head(tmp_path):
    family_of_ties(tmp_path, True, (False, False), words=False)
    plan = make_plan(tmp_path / "base", {name: tmp_path / "tasks" / name for name in ("task0", "task1")})
    assert plan.tensor("lm_head.weight").class_ == "private"


def test_a_shared_head_of_a_bin_and_a_tied_one_of_safetensors_are_tied(tmp_path):
    states = family_of_ties(tmp_path, True, (True, True), stored=("base", "task0", "task1"))
    (tmp_path / "tasks/task0/model.safetensors").unlink()
    (tmp_path / "tasks/task0/config.json").unlink()
    shared = dict(states["task0"])
    shared["lm_head.weight"] = shared["embed_tokens.weight"]
    write_checkpoint(tmp_path / "tasks/task0", shared, layout="bin")
    plan = make_plan(tmp_path / "base", {name: tmp_path / "tasks" / name for name in ("task0", "task1")})
    assert plan.tensor("lm_head.weight").class_ == "tied"


def test_an_untied_vocabulary_of_a_tied_base_may_be_resized(tmp_path):
    """The head's base is the embedding that it is tied to, row by row."""
    states = family_of_ties(tmp_path, True, (False, False))
    for name in ("embed_tokens.weight", "lm_head.weight"):
        states["task1"][name] = torch.cat([states["task1"][name], normal(5, 3, 8)])
    write_checkpoint(tmp_path / "tasks/task1", states["task1"])
    plan = make_plan(
        tmp_path / "base", {name: tmp_path / "tasks" / name for name in ("task0", "task1")}, output=tmp_path / "p.json"
    )
    assert plan.tensor("lm_head.weight").class_ == "mergeable" and plan.tensor("lm_head.weight").shape == (11, 8)
    succeeds("merge", tmp_path / "p.json", "--method", "emr", "-o", tmp_path / "bundle")
    assert verify(tmp_path / "bundle", decode=True).bad == {}
    assert same_bits(open_bundle(tmp_path / "bundle").view("task1")["lm_head.weight"][11:], normal(5, 3, 8))
