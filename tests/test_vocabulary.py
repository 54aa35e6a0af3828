"""Vocabularies that differ: rows that base and all tasks have merge, each task's other rows come back exactly."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flexmerge_cli import load_plan, open_bundle, verify
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.evaluation import plane
from flexmerge_cli.evaluation.models import base_model
from flexmerge_cli.evaluation.planned import planned_models
from flexmerge_cli.planning.sources import open_sources

from .families import LAYOUTS, Models, assert_same_state, encoder, normal, same_bits, tuned, write_checkpoint
from .program import ROOT, fails, flexmerge, stored_sizes, succeeds

EMBEDDING = "embeddings.word_embeddings.weight"
OUTPUT, BIAS = "cls.predictions.decoder.weight", "cls.predictions.bias"
WORDS = [f"word{number}" for number in range(11)]


def model(seed, *, rows=11):
    """An encoder with an output layer, its vocabulary of `rows`."""
    state = encoder() | {OUTPUT: normal(901, 11, 8), BIAS: normal(902, 11)}
    state = tuned(state, seed) if seed else state
    for number, name in enumerate((EMBEDDING, OUTPUT, BIAS)):
        own = normal(seed * 31 + number, max(0, rows - 11), *state[name].shape[1:])
        state[name] = torch.cat([state[name], own])[:rows]
    return state


def family(root: Path, words: dict[str, list[str | None]], *, tokenizers=True, layout="file", file="vocab.json"):
    """One model per entry, rows by its words; None is a row without one. A row of a word that the base has is near
    the base's. `base` is the base."""
    states = {}
    for seed, (name, own) in enumerate(words.items()):
        state = model(seed, rows=max(11, len(words["base"])))
        for number, tensor in enumerate((EMBEDDING, OUTPUT, BIAS)):
            values = state[tensor]
            more = normal(77 * seed + number, len(own), *values.shape[1:])
            known = [words["base"].index(word) if word in words["base"] and word else -1 for word in own]
            state[tensor] = torch.stack([values[at] if at >= 0 else more[row] for row, at in enumerate(known)])
        states[name] = state
        folder = root / "base" if name == "base" else root / "tasks" / name
        write_checkpoint(folder, state, layout=layout)
        (folder / "config.json").write_text('{"model_type": "test", "tie_word_embeddings": false}')
        if tokenizers:
            write_tokenizer(folder, own, file)
    base = states.pop("base")
    return Models(base=base, tasks=states)


def write_tokenizer(folder: Path, words: list[str | None], file: str) -> None:
    """Write a model's words as different tokenizers keep them."""
    rows = {word: row for row, word in enumerate(words) if word is not None}
    added = {word: row for word, row in rows.items() if word not in WORDS}
    known = {word: row for word, row in rows.items() if word in WORDS}
    match file:
        case "vocab.json":
            (folder / "vocab.json").write_text(json.dumps(known))
            (folder / "added_tokens.json").write_text(json.dumps(added))
        case "tokenizer.json":
            tokens = [{"id": row, "content": word, "special": True} for word, row in added.items()]
            value = {"version": "1.0", "added_tokens": tokens, "model": {"type": "BPE", "vocab": known, "merges": []}}
            (folder / "tokenizer.json").write_text(json.dumps(value))
        case "unigram":
            pieces = [[word or f"<unused{row}>", -1.0] for row, word in enumerate(words)]
            value = {"added_tokens": [], "model": {"type": "Unigram", "vocab": pieces}}
            (folder / "tokenizer.json").write_text(json.dumps(value))
        case "vocab.txt":
            (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words if word in WORDS))
            decoder = {str(row): {"content": word} for word, row in added.items()}
            (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))


def planned(root: Path, *options: object):
    path = root / "plan.json"
    succeeds("plan", "--base", root / "base", "--tasks", root / "tasks", "-o", path, "--force", *options)
    return load_plan(path)


def merged(root: Path, *options: object) -> Path:
    """A bundle, checked in every way: bytes as foretold, digests, the independent reader, exports as views."""
    bundle = root / ("bundle" + "-".join(map(str, options)).replace("/", "_").replace(":", "_"))
    foretold = succeeds("merge", root / "plan.json", *options, "-o", bundle, "--dry-run", "--json").json
    succeeds("merge", root / "plan.json", *options, "-o", bundle)
    assert sum(stored_sizes(bundle).values()) == foretold["total_bytes"]
    assert verify(bundle, decode=True).bad == {}
    opened, reader = open_bundle(bundle), independent_reader()
    succeeds("export", bundle, "--all", "-o", root / "exports" / bundle.name)
    for task in opened.tasks:
        view = opened.view(task)
        assert_same_state(load_file(root / "exports" / bundle.name / task / "model.safetensors"), dict(view))
        assert_same_state(opened.view(task, copy=True), dict(view))
        read = reader.read_task(bundle, task)
        assert {name: bits.tobytes() for name, (_, bits) in read.items()} == {
            name: value.contiguous().view(torch.uint8).numpy().tobytes() for name, value in view.items()
        }
        assert {name: bits.shape for name, (_, bits) in read.items()} == {n: tuple(v.shape) for n, v in view.items()}
        assert reader.check(bundle, task) == len(read)
    succeeds("inspect", bundle, "--verify", "--decode")
    return bundle


def independent_reader():
    spec = importlib.util.spec_from_file_location("read_bundle", ROOT / "samples/read_bundle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(words: list[str | None], wanted: list[str]) -> list[int]:
    return [words.index(word) for word in wanted]


@pytest.fixture(autouse=True)
def folders(tmp_path):
    (tmp_path / "exports").mkdir()
    for name in ("base", "tasks"):
        (tmp_path / name).mkdir()


def by_hand(models: Models, words: dict, name: str, wanted: list[str], scale: float = 1.0) -> torch.Tensor:
    """base + scale · mean(τ) of the rows of these words."""
    base = models.base[name][rows_of(words["base"], wanted)]
    deltas = [state[name][rows_of(words[task], wanted)] - base for task, state in sorted(models.tasks.items())]
    return base + scale * torch.stack(deltas).double().mean(0).float()


def assert_merged_and_own(models, words, bundle, common):
    """At 1x, common rows are the merged ones, all other rows the task's own bits."""
    opened = open_bundle(bundle)
    for task, state in models.tasks.items():
        view = opened.view(task)
        at = rows_of(words[task], common)
        others = [row for row in range(len(words[task])) if row not in at]
        for name in (EMBEDDING, OUTPUT, BIAS):
            assert view[name].shape == state[name].shape
            assert same_bits(view[name][others], state[name][others]), (task, name)
            torch.testing.assert_close(view[name][at], by_hand(models, words, name, common), rtol=0, atol=1e-6)


EIGHT = {"base": WORDS} | {f"task{n}": WORDS + (["a", "b", "c"] if n == 3 else []) for n in range(8)}
FILES = ["vocab.json", "tokenizer.json", "unigram", "vocab.txt"]


@pytest.mark.parametrize("file", FILES)
def test_three_added_tokens_of_one_task_among_eight_cost_their_rows_alone(file, tmp_path):
    models = family(tmp_path, EIGHT, file=file)
    planned(tmp_path, "--private", "*predictions*", "--private", EMBEDDING)
    private = open_bundle(merged(tmp_path, "--method", "average", "--size", "1x", "--threads", "2"))
    plan = planned(tmp_path)
    assert {plan.tensor(name).class_ for name in (EMBEDDING, OUTPUT, BIAS)} == {"mergeable"}
    assert [sorted(v.tensors) for v in plan.vocabularies] == [sorted([EMBEDDING, OUTPUT, BIAS])]
    bundle = merged(tmp_path, "--method", "average", "--size", "1x")
    opened = open_bundle(bundle)
    assert_merged_and_own(models, EIGHT, bundle, WORDS)
    row_bytes = 4 * (8 + 8 + 1)
    assert opened.manifest.stored_bytes == private.manifest.stored_bytes - 7 * len(WORDS) * row_bytes
    rows = opened._bundle.parts["weights/task3.safetensors"]
    assert {name: part.shape for name, part in rows.items() if "@rows" in name} == {
        f"{EMBEDDING}@rows": (3, 8), f"{OUTPUT}@rows": (3, 8), f"{BIAS}@rows": (3,),
    }  # fmt: skip
    # The others read one file, that of all, and load in transformers from the bundle; task3 after an export.
    assert {task for task in opened.tasks if (bundle / "tasks" / task / "model.safetensors").is_file()} == {
        task for task in opened.tasks if task != "task3"
    }
    assert all(opened._bundle.route(task) == ["weights/all.safetensors"] for task in opened.tasks if task != "task3")


CASES = {
    "permuted": {"base": WORDS, "a": WORDS[::-1], "b": WORDS[5:] + WORDS[:5], "c": WORDS},
    "permuted and added": {"base": WORDS, "a": ["new", *WORDS[::-1]], "b": WORDS, "c": ["x", *WORDS, "y"]},
    "fewer": {"base": WORDS, "a": WORDS[:6], "b": WORDS, "c": WORDS},
    "removed in the middle": {"base": WORDS, "a": WORDS[:4] + WORDS[7:], "b": WORDS, "c": WORDS[1:]},
    "a base of more": {"base": [*WORDS, "mask"], "a": WORDS, "b": WORDS, "c": WORDS},
    "padded to 8": {"base": WORDS, "a": [*WORDS, "new"] + [None] * 4, "b": WORDS, "c": WORDS + [None] * 5},
    "padded to 64": {"base": WORDS + [None] * 53, "a": [*WORDS, "new"] + [None] * 52, "b": WORDS, "c": WORDS},
    "a token in the padding": {"base": [*WORDS, None], "a": [*WORDS, "new"], "b": [*WORDS, None], "c": [*WORDS, None]},
    "one replaced": {"base": WORDS, "a": [*WORDS[:3], "new", *WORDS[4:]], "b": WORDS, "c": WORDS},
    "all different": {"base": WORDS, "a": [*WORDS, "a"], "b": [*WORDS[2:], "b", "c"], "c": ["d", *WORDS[:9]]},
}


def common_of(words: dict) -> list[str]:
    return [word for word in words["base"] if word is not None and all(word in own for own in words.values())]


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_compared_by_token(case, file, tmp_path):
    words = CASES[case]
    models = family(tmp_path, words, file=file)
    plan = planned(tmp_path)
    assert len(plan.vocabularies) == 1 and not any(rows.leading for rows in plan.vocabularies[0].tasks)
    common = common_of(words)
    # Rows without a token go by their place, in all models alike.
    padding = all(len(own) > 11 and own[-1] is None for own in words.values())
    assert plan.tensor(EMBEDDING).shape[0] == len(common) + padding * sum(
        all(row < len(own) and own[row] is None for own in words.values()) for row in range(64)
    )
    for options in (("--method", "average", "--size", "1x"), (), ("--dtype", "bf16")):
        bundle = merged(tmp_path, *options)
        opened = open_bundle(bundle)
        assert opened.manifest.stored_bytes <= sum(
            v.numel() * v.element_size() for state in models.tasks.values() for v in state.values()
        )
        if options == ():
            for task, state in models.tasks.items():
                assert_same_state(opened.view(task), state)
        elif "--method" in options and not padding:
            assert_merged_and_own(models, words, bundle, common)


@pytest.mark.parametrize("method", ["emr", "ties", "low_bit:bits=2", "low_rank", "auto"])
def test_every_way_to_store_gives_own_rows_back_exactly(method, tmp_path):
    words = CASES["permuted and added"]
    models = family(tmp_path, words)
    planned(tmp_path)
    opened = open_bundle(merged(tmp_path, "--method", method))
    for task, state in models.tasks.items():
        own = [row for row, word in enumerate(words[task]) if word not in WORDS]
        for name in (EMBEDDING, OUTPUT, BIAS):
            assert same_bits(opened.view(task)[name][own], state[name][own])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_checkpoint_gives_its_rows(layout, tmp_path):
    words = CASES["all different"]
    models = family(tmp_path, words, layout=layout)
    planned(tmp_path)
    bundle = merged(tmp_path)
    for task, state in models.tasks.items():
        assert_same_state(open_bundle(bundle).view(task), state)


def test_a_strided_embedding_of_a_bin_gives_its_rows(tmp_path):
    words = CASES["permuted and added"]
    models = family(tmp_path, words)
    (tmp_path / "tasks/a/model.safetensors").unlink()
    strided = dict(models.tasks["a"])
    strided[EMBEDDING] = strided[EMBEDDING].T.contiguous().T
    torch.save(strided, tmp_path / "tasks/a/pytorch_model.bin")
    planned(tmp_path)
    assert_same_state(open_bundle(merged(tmp_path)).view("a"), models.tasks["a"])


def test_without_a_tokenizer_the_leading_rows_are_common_and_that_is_said(tmp_path):
    words = {"base": WORDS, "a": [*WORDS, "x", "y"], "b": WORDS[:9], "c": WORDS}
    models = family(tmp_path, words, tokenizers=False)
    result = flexmerge("plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "plan.json")
    assert "compared by place" in result.err and "a, b, c: the base: no tokenizer" in " ".join(result.err.split())
    assert "rows of the base that some task lacks: 2 (9–10)" in result.out
    assert "9 rows in all models" in " ".join(result.out.split())
    found = succeeds("inspect", tmp_path / "plan.json", "--json").json["vocabularies"][0]
    assert found["tasks"]["a"] == {"rows": 13, "own_rows": 4, "compared_by": "place", "why": "the base: no tokenizer"}
    dry = succeeds("plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "--dry-run", "--json").json
    assert dry["vocabularies"] == [found]
    assert_merged_and_own(models, words, merged(tmp_path, "--method", "average", "--size", "1x"), WORDS[:9])


UNSOUND = {
    "cut": b'{"model": {"vocab": {"wor',
    "no JSON": b"\xff\xfe",
    "a list": b"[1, 2]",
    "no vocabulary": b'{"model": {}}',
    "ids that are text": b'{"model": {"vocab": {"a": "0"}}}',
    "negative ids": b'{"model": {"vocab": {"a": -1}}}',
    "ids that are true": b'{"model": {"vocab": {"a": true}}}',
    "huge ids": b'{"model": {"vocab": {"a": 99999999999999999999}}}',
    "pieces that are numbers": b'{"model": {"vocab": [[1, 2], [3, 4]]}}',
    "added tokens that are none": b'{"added_tokens": [3], "model": {"vocab": {}}}',
    "added tokens without a name": b'{"added_tokens": [{"id": 3, "content": ["a"]}], "model": {"vocab": {}}}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("case", UNSOUND)
def test_an_unsound_tokenizer_is_as_good_as_none_and_told(case, tmp_path):
    words = {"base": WORDS, "a": [*WORDS, "x"], "b": WORDS}
    models = family(tmp_path, words, file="tokenizer.json")
    (tmp_path / "tasks/a/tokenizer.json").write_bytes(UNSOUND[case])
    result = flexmerge("plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "plan.json")
    assert result.code == 0 and "in a: the task: tokenizer.json" in " ".join(result.err.split()), result.err
    assert_merged_and_own(models, words, merged(tmp_path, "--method", "average", "--size", "1x"), WORDS)


def test_one_size_and_one_order_of_tokens_is_no_vocabulary_of_its_own(tmp_path):
    """Another file with the same tokens changes nothing: the task still loads from the bundle itself."""
    family(tmp_path, {"base": WORDS, "a": WORDS, "b": WORDS}, file="tokenizer.json")
    value = json.loads((tmp_path / "tasks/a/tokenizer.json").read_text()) | {"padding": {"length": 8}}
    (tmp_path / "tasks/a/tokenizer.json").write_text(json.dumps(value, indent=1))
    plan = planned(tmp_path)
    assert not plan.vocabularies and not plan.rows
    assert (merged(tmp_path) / "tasks/a").exists()


def test_equal_own_rows_are_stored_once(tmp_path):
    words = {"base": WORDS, "a": [*WORDS, "x"], "b": [*WORDS, "x"], "c": WORDS}
    models = family(tmp_path, words)
    for name in (EMBEDDING, OUTPUT, BIAS):
        models.tasks["b"][name][-1] = models.tasks["a"][name][-1]
    write_checkpoint(tmp_path / "tasks/b", models.tasks["b"])
    planned(tmp_path)
    bundle = open_bundle(merged(tmp_path, "--method", "average", "--size", "1x"))
    assert set(bundle._bundle.parts) == {"weights/all.safetensors", "weights/a+b.safetensors"}


def test_wrapped_names_and_own_dtypes_come_back(tmp_path):
    words = CASES["permuted and added"]
    models = family(tmp_path, words)
    models.tasks["a"] = {f"bert.{name}": value.bfloat16() for name, value in models.tasks["a"].items()}
    write_checkpoint(tmp_path / "tasks/a", models.tasks["a"])
    planned(tmp_path)
    for task, state in models.tasks.items():
        assert_same_state(open_bundle(merged(tmp_path, "--threads", {"a": 1, "b": 2, "c": 3}[task])).view(task), state)


@pytest.mark.parametrize("pattern", [EMBEDDING, "*"])
def test_what_is_asked_to_stay_private_is_not_split(pattern, tmp_path):
    family(tmp_path, EIGHT)
    plan = planned(tmp_path, "--private", pattern)
    assert plan.tensor(EMBEDDING).class_ == "private"
    assert EMBEDDING not in {name for vocabulary in plan.vocabularies for name in vocabulary.tensors}


def test_heads_and_positions_of_other_sizes_are_no_vocabularies(tmp_path):
    models = Models(base=model(0), tasks={f"t{n}": model(n + 1) for n in range(3)})
    for number, state in enumerate([models.base, *models.tasks.values()]):
        state["classifier.weight"] = normal(number, 3 + number, 8)
        state["embeddings.position_embeddings.weight"] = normal(number, 16 + number, 8)
        state["encoder.adapter.weight"] = normal(number, 5 + number, 8)
    write_checkpoint(tmp_path / "base", models.base)
    for name, state in models.tasks.items():
        write_checkpoint(tmp_path / "tasks" / name, state)
    plan = planned(tmp_path, "--merge-heads")
    assert not plan.vocabularies
    assert plan.tensor("classifier.weight").reason == "of another shape"


def test_a_matrix_of_the_configs_vocab_size_is_a_vocabulary_whatever_its_name(tmp_path):
    models = Models(base=model(0), tasks={f"t{n}": model(n + 1) for n in range(3)})
    for name, state in {"base": models.base, **models.tasks}.items():
        rows = 24 if name == "t1" else 20
        state["lookup.table"] = normal(len(name) + rows, rows, 4)
        folder = tmp_path / "base" if name == "base" else tmp_path / "tasks" / name
        write_checkpoint(folder, state)
        (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": rows}}))
    plan = planned(tmp_path)
    assert [vocabulary.tensors for vocabulary in plan.vocabularies] == [("lookup.table",)]
    assert plan.tensor("lookup.table").shape == (20, 4)


def test_a_source_that_changed_in_its_own_rows_is_told(tmp_path):
    models = family(tmp_path, EIGHT)
    planned(tmp_path)
    models.tasks["task3"][EMBEDDING][-1, 0] += 1
    write_checkpoint(tmp_path / "tasks/task3", models.tasks["task3"])
    fails(3, "merge", tmp_path / "plan.json", "-o", tmp_path / "b", says=("task3", EMBEDDING, "changed"))
    models.tasks["task3"][EMBEDDING] = models.tasks["task3"][EMBEDDING][:-1]
    write_checkpoint(tmp_path / "tasks/task3", models.tasks["task3"])
    fails(3, "merge", tmp_path / "plan.json", "-o", tmp_path / "b", says=("task3", EMBEDDING, "[14, 8], now"))


def test_verify_names_the_task_whose_rows_are_damaged(tmp_path):
    family(tmp_path, EIGHT)
    planned(tmp_path)
    bundle = merged(tmp_path, "--method", "average", "--size", "1x")
    part = open_bundle(bundle)._bundle.parts["weights/task3.safetensors"][f"{OUTPUT}@rows"]
    with part.path.open("r+b") as file:
        file.seek(part.offset)
        file.write(b"\x55")
    result = flexmerge("inspect", bundle, "--verify", "--decode")
    assert result.code == 5 and f"part {OUTPUT}@rows" in result.out and "broken tasks: task3" in result.out


@pytest.mark.parametrize("tied", ["config", "bin"])
def test_what_is_tied_to_a_vocabulary_comes_back_in_its_rows(tied, tmp_path):
    words = CASES["permuted and added"]
    models = family(tmp_path, words)
    config = {"model_type": "test", "tie_word_embeddings": tied == "config"}
    for name, state in {"base": models.base, **models.tasks}.items():
        folder = tmp_path / "base" if name == "base" else tmp_path / "tasks" / name
        del state[OUTPUT], state[BIAS]
        state["lm_head.weight"] = state[EMBEDDING] if tied == "bin" else state[EMBEDDING].clone()
        (folder / "model.safetensors").unlink()
        write_checkpoint(folder, state, layout="bin" if tied == "bin" else "file")
        (folder / "config.json").write_text(json.dumps(config))
    plan = planned(tmp_path)
    assert plan.tensor("lm_head.weight").class_ == "tied"
    for options in ((), ("--method", "average", "--size", "1x"), ("--method", "emr")):
        opened = open_bundle(merged(tmp_path, *options))
        for task, state in models.tasks.items():
            view = opened.view(task)
            assert same_bits(view["lm_head.weight"], view[EMBEDDING])
            assert view[EMBEDDING].shape == state[EMBEDDING].shape
            if not options:
                assert_same_state(view, state)


def test_plans_of_a_plan_keep_their_vocabularies(tmp_path):
    words = CASES["permuted and added"]
    models = family(tmp_path, words)
    first = planned(tmp_path, "--statistics", "gram")
    succeeds("plan", tmp_path / "plan.json", "--blocks", "layer", "--statistics", "all", "-o", tmp_path / "again.json")
    again = load_plan(tmp_path / "again.json")
    assert again.vocabularies == first.vocabularies and again.rows == first.rows
    (tmp_path / "again.json").replace(tmp_path / "plan.json")
    for task, state in models.tasks.items():
        assert_same_state(open_bundle(merged(tmp_path, "--threads", len(task))).view(task), state)
        break


@pytest.mark.parametrize("tied", [False, True])
def test_references_of_an_evaluation_are_whole(tied, tmp_path):
    """The fine-tuned model is the source's; the base has its own rows where the task has a row of its own."""
    words = CASES["permuted and added"]
    models = family(tmp_path, words)
    if tied:
        for name, state in {"base": models.base, **models.tasks}.items():
            state[OUTPUT] = state[EMBEDDING].clone()
            folder = tmp_path / "base" if name == "base" else tmp_path / "tasks" / name
            write_checkpoint(folder, state)
            (folder / "config.json").write_text('{"model_type": "test", "tie_word_embeddings": true}')
    plan = planned(tmp_path)
    assert plan.tensor(OUTPUT).class_ == ("tied" if tied else "mergeable")
    sources = open_sources(plan, tmp_path)
    folders = {name: tmp_path / "tasks" / name for name in models.tasks}
    fine_tuned, base = planned_models(plan, sources.located, folders, list(models.tasks))
    for task, state in models.tasks.items():
        assert_same_state(fine_tuned[task].weights, state)
        for row, word in enumerate(words[task]):
            expected = models.base[EMBEDDING][WORDS.index(word)] if word in WORDS else state[EMBEDDING][row]
            assert same_bits(base[task].weights[EMBEDDING][row], expected), (task, word)
    assert len({model.digest for model in fine_tuned.values()}) == len(models.tasks)
    bundle = Bundle.open(merged(tmp_path, "--method", "average", "--size", "1x"))
    for task in models.tasks:
        found = base_model(bundle, task, open_checkpoint(str(tmp_path / "base")), {})
        assert_same_state(found.weights, base[task].weights)


class Noted:
    """A scorer that keeps the weights and digests of what it is to score."""

    def __init__(self):
        self.weights, self.digests = {}, []

    def score(self, model, *, reference):
        self.weights.setdefault(model.task, []).append(dict(model.weights))
        self.digests.append(model.digest)


def plane_of(root, plan, places, monkeypatch):
    """What `curve --plane two,one` scores of each of both tasks, point by point."""
    monkeypatch.setattr(plane, "PLACES", places)
    folders = {name: root / "tasks" / name for name in plan.task_names}
    models, scorer = planned_models(plan, open_sources(plan, root).located, folders, plan.task_names), Noted()
    plane.score_plane(plan, ("two", "one"), scorer, *models)
    return scorer


def test_on_the_plane_of_two_tasks_rows_of_the_same_word_are_mixed(tmp_path, monkeypatch):
    words = {
        "base": WORDS, "one": [WORDS[3], "new", *WORDS[:3], *WORDS[4:]], "two": [*WORDS, "other"],
        "three": [*WORDS[:5], *WORDS[6:], "more"],
    }  # fmt: skip
    models = family(tmp_path, words)
    assert models.tasks["one"][EMBEDDING].shape == models.tasks["two"][EMBEDDING].shape
    found = plane_of(tmp_path, planned(tmp_path), (0.0, 0.5), monkeypatch).weights
    for tensor in (EMBEDDING, OUTPUT, BIAS):
        for task, other in (("one", "two"), ("two", "one")):
            own, average = models.tasks[task][tensor], found[task][-1][tensor]
            for row, word in enumerate(words[task]):
                expected = own[row]
                if all(word in known for known in words.values()):
                    expected = (own[row] + models.tasks[other][tensor][words[other].index(word)]) / 2
                torch.testing.assert_close(average[row], expected, rtol=1e-5, atol=1e-6)


def test_what_a_plan_merges_is_part_of_what_the_plane_is_cached_by(tmp_path, monkeypatch):
    """A tensor that one task has of the base, and the other has not, moves that task's points only if it merges."""
    models = family(tmp_path, dict.fromkeys(("base", "one", "two"), WORDS))
    name = "encoder.layer.0.attention.self.query.weight"
    models.tasks["one"][name] = models.base[name]
    write_checkpoint(tmp_path / "tasks" / "one", models.tasks["one"])
    (tmp_path / "tasks/one/config.json").write_text((tmp_path / "base/config.json").read_text())
    merging, private = (
        plane_of(tmp_path, planned(tmp_path, *options), (0.5,), monkeypatch) for options in ((), ("--private", name))
    )
    assert not torch.equal(merging.weights["one"][0][name], private.weights["one"][0][name])
    assert not set(merging.digests) & set(private.digests)


@pytest.mark.parametrize("more", [3, -5])
def test_an_adapter_beside_a_resized_fine_tune_reads_the_whole_base(more, tmp_path):
    """Where the base's rows are all common they merge; where a task lacks some, the embedding is private."""
    pytest.importorskip("peft")
    from .adapters import LORA, make

    lora = LORA(r=2, target_modules=["q_proj"])
    adapted = make(tmp_path / "family", "llama", {"adapter": lora})
    full = {name: adapted.full(name, seed) for seed, name in enumerate(("full", "resized"))}
    model = adapted.model(full["resized"])
    model.resize_token_embeddings(50 + more)
    model.save_pretrained(full["resized"])
    tasks = [f"--task={name}={folder}" for name, folder in {**full, "adapter": adapted.tasks / "adapter"}.items()]
    succeeds("plan", "--base", adapted.base, *tasks, "-o", tmp_path / "plan.json")
    expected = "mergeable" if more > 0 else "private"
    assert load_plan(tmp_path / "plan.json").tensor("model.embed_tokens.weight").class_ == expected
    for options in ((), ("--method", "average")):
        bundle = tmp_path / f"bundle{len(options)}"
        succeeds("merge", tmp_path / "plan.json", *options, "-o", bundle)
        assert verify(bundle, decode=True).bad == {}
        view = open_bundle(bundle).view("resized")
        source = load_file(full["resized"] / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert view[name].shape == (50 + more, 32) and same_bits(view[name][50:], source[name][50:])
        if not options:
            assert_same_state(view, source)
        succeeds("export", bundle, "--task", "adapter", "-o", tmp_path / f"adapter{len(options)}")
        weights = [
            folder / "adapter_model.safetensors"
            for folder in (tmp_path / f"adapter{len(options)}", adapted.tasks / "adapter")
        ]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        succeeds("export", bundle, "--task", "adapter", "--merged", "-o", tmp_path / f"merged{len(options)}")
        logits = [
            adapted.logits(adapted.model(folder))
            for folder in (tmp_path / f"merged{len(options)}", adapted.merged / "adapter")
        ]
        torch.testing.assert_close(*logits)
