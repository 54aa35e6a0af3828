"""Families of transformers, end to end: plan, merge at 1x, 2x and Mx, export, load, and the logits that must come."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from flexmerge_cli import export, load_plan, make_plan, merge, open_bundle, verify  # noqa: E402

from .transformers_families import FAMILIES, TASKS, load, make, merge_by_hand, outputs, read  # noqa: E402


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """(family, its folder, plan.json)."""
    family, root = FAMILIES[request.param], tmp_path_factory.mktemp("family")
    make(family, root)
    make_plan(root / "base", {name: root / "tasks" / name for name in TASKS}, output=root / "plan.json")
    return family, root, root / "plan.json"


def bundled(root: Path, plan: Path, size: str | None):
    bundle = root / f"bundle-{size}"
    if not bundle.exists():
        merge(plan, bundle, **({"method": "average", "size": size} if size else {}))
        assert verify(bundle, decode=True).bad == {}
        for task in TASKS:
            (root / f"exports-{size}").mkdir(exist_ok=True)
            export(bundle, task, root / f"exports-{size}" / task)
    return open_bundle(bundle), root / f"exports-{size}"


def test_tensors_are_in_their_classes(made):
    family, root, path = made
    plan = load_plan(path)
    for part, expected in family.classes.items():
        found = {tensor.name: tensor.class_ for tensor in plan.tensors if part in tensor.name}
        assert found and set(found.values()) <= {expected, "constant"}, found
    rest = {t.name: t.class_ for t in plan.tensors if not any(part in t.name for part in family.classes)}
    assert set(rest.values()) <= {"mergeable", "constant", "tied"}, rest
    assert sum(found == "mergeable" for found in rest.values()) > 10
    for number, task in enumerate(TASKS):
        saved = {plan.own_name(number, t.name) for t in plan.tensors if number in t.present}
        assert saved == set(read(root / "tasks" / task)), task


@pytest.mark.parametrize("size", [None, "3x"])
def test_nothing_merged_gives_the_sources_logits(size, made):
    family, root, plan = made
    bundle, exports = bundled(root, plan, size)
    for task in TASKS:
        expected = outputs(family, load(family, root / "tasks" / task))
        assert torch.equal(outputs(family, load(family, exports / task)), expected)
        assert bundle.manifest.tasks[task].exact


def test_all_merged_gives_the_logits_of_a_merge_by_hand(made):
    family, root, plan = made
    bundle, exports = bundled(root, plan, "1x")
    classes = {tensor.name: tensor.class_ for tensor in load_plan(plan).tensors}
    merge_by_hand(root, lambda name: classes.get(name) == "mergeable", root / "by-hand")
    for task in TASKS:
        model, by_hand = load(family, exports / task), load(family, root / "by-hand" / task)
        state = model.state_dict()
        for name, value in by_hand.state_dict().items():
            # One rounding of the dtype: base + mean is rounded once here and once there.
            torch.testing.assert_close(state[name], value, rtol=torch.finfo(family.dtype).eps, atol=1e-7)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if family.dtype is torch.float32 else {"rtol": 0.05, "atol": 0.02}
        torch.testing.assert_close(outputs(family, model), outputs(family, by_hand), **tolerance)
        assert not torch.equal(outputs(family, model), outputs(family, load(family, root / "tasks" / task)))
        assert torch.equal(outputs(family, bundle.model(task)), outputs(family, model))


def test_a_part_merged_loads_and_every_task_is_between(made):
    family, root, plan = made
    bundle, exports = bundled(root, plan, "2x")
    assert bundle.manifest.stored_bytes <= 2 * bundle.manifest.one_model_bytes
    one, _ = bundled(root, plan, "1x")
    assert one.manifest.stored_bytes < bundle.manifest.stored_bytes
    for task in TASKS:
        model = load(family, exports / task)
        assert torch.isfinite(outputs(family, model)).all()
        view = bundle.view(task)
        for name, value in model.state_dict().items():
            if name in view:
                assert torch.equal(value, view[name]), name
        if (root / "bundle-2x/tasks" / task).is_dir():
            inside = load(family, root / "bundle-2x/tasks" / task)
            assert torch.equal(outputs(family, inside), outputs(family, model))


def tokenizer(words: list[str]):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: row for row, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_models_with_added_tokens_come_back_with_their_tokenizers(kind, tmp_path):
    """Resize as `resize_token_embeddings` does: by three tokens, and padded to a multiple of 8."""
    words = ["[UNK]", "[PAD]"] + [f"word{number}" for number in range(27)]
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=29, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        make_model = transformers.GPT2LMHeadModel
    else:
        config = transformers.BertConfig(
            vocab_size=29, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
        make_model = transformers.BertForMaskedLM
    models = {}
    for number, name in enumerate(("base", "plain", "added", "padded")):
        torch.manual_seed(0)
        model, own = make_model(config).eval(), tokenizer(words)
        torch.manual_seed(number)
        if name in ("added", "padded"):
            own.add_tokens([f"<{name}{token}>" for token in range(3)])
            model.resize_token_embeddings(len(own), pad_to_multiple_of=8 if name == "padded" else None)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.02 * number * torch.randn_like(value))
        folder = tmp_path / ("base" if name == "base" else f"tasks/{name}")
        model.save_pretrained(folder)
        own.save_pretrained(folder)
        models[name] = model
    assert models["padded"].get_input_embeddings().weight.shape[0] == 32
    tasks = {name: tmp_path / "tasks" / name for name in ("plain", "added", "padded")}
    plan = make_plan(tmp_path / "base", tasks, output=tmp_path / "plan.json")
    (vocabulary,) = plan.vocabularies
    assert [rows.rows for rows in vocabulary.tasks] == [32, 32, 29] and not any(r.leading for r in vocabulary.tasks)
    assert {plan.tensor(name).class_ for name in vocabulary.tensors} <= {"mergeable", "tied"}
    ids = torch.arange(12).view(2, 6)
    for size in (None, "1x"):
        bundle = merge(
            tmp_path / "plan.json", tmp_path / f"bundle{size}", **({"method": "average", "size": size} if size else {})
        )
        assert verify(tmp_path / f"bundle{size}", decode=True).bad == {}
        for name, folder in tasks.items():
            export(tmp_path / f"bundle{size}", name, tmp_path / f"{name}{size}")
            found, source = make_model.from_pretrained(tmp_path / f"{name}{size}"), make_model.from_pretrained(folder)
            rows, expected = found.get_input_embeddings().weight, source.get_input_embeddings().weight
            assert rows.shape == expected.shape and torch.equal(rows[29:], expected[29:])
            assert torch.equal(found.get_output_embeddings().weight, rows)
            with torch.inference_mode():
                same = torch.equal(found.eval()(ids).logits, source.eval()(ids).logits)
                assert torch.equal(bundle.model(name)(ids).logits, found(ids).logits)
            assert same == (size is None)
            assert transformers.AutoTokenizer.from_pretrained(tmp_path / f"{name}{size}").get_vocab() == (
                transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
            )
