import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.family.align import align

from ..calls import num_calls


def tensors(*names, shape=(2,)):
    """Names, or (name, shape)."""
    pairs = [name if isinstance(name, tuple) else (name, shape) for name in names]
    return {name: StoredTensor(name=name, dtype="F32", shape=own, path=None, offset=0) for name, own in pairs}


def aligned(base, task, **known):
    return align(base, task, **known).names


BODY = ("embed.weight", "layer.0.attn.weight", "layer.0.mlp.weight")
TOWER = tuple(f"encoder.layers.{i}.{part}.weight" for i in range(3) for part in ("q_proj", "v_proj", "fc1", "fc2"))


def under(prefix, names=TOWER):
    return tuple(prefix + name for name in names)


def test_equal_names_need_no_rename():
    found = align(tensors(*BODY), tensors(*BODY, "classifier.weight"))
    assert found.names == {name: name for name in (*BODY, "classifier.weight")}
    assert found.matched == set(BODY) and found.wrapper == ""


@pytest.mark.parametrize("prefix", ["bert.", "model.language_model.", "a.b.c.d."])
def test_a_wrapper_of_the_task_is_dropped(prefix):
    base, task = (
        tensors(*BODY),
        tensors(*(prefix + name for name in BODY), "classifier.weight", f"{prefix}pooler.weight"),
    )
    assert aligned(base, task) == {
        **{prefix + name: name for name in BODY},
        "classifier.weight": "classifier.weight",
        f"{prefix}pooler.weight": "pooler.weight",
    }
    assert align(base, task).wrapper == prefix


@pytest.mark.parametrize("prefix", ["bert.", "model.language_model."])
def test_a_wrapper_of_the_base_is_added_and_only_to_what_the_base_has(prefix):
    base, task = tensors(*(prefix + name for name in BODY), "lm_head.weight"), tensors(*BODY, "classifier.weight")
    assert aligned(base, task) == {**{name: prefix + name for name in BODY}, "classifier.weight": "classifier.weight"}


def test_prefixes_are_whole_segments():
    """`roberta.` is no `berta.` with `ro` before it."""
    base, task = tensors("berta.a.weight", "berta.b.weight"), tensors("roberta.a.weight", "roberta.b.weight")
    assert not align(base, task).matched


def test_shapes_count():
    """Under the longer prefix and under none there are tensors of equal names; only one has their shapes."""
    base = tensors(("w.a", (2,)), ("w.b", (3,)), ("a", (9,)), ("b", (9,)))
    assert aligned(base, tensors(("w.a", (2,)), ("w.b", (3,)))) == {"w.a": "w.a", "w.b": "w.b"}
    assert aligned(base, tensors(("a", (2,)), ("b", (3,)))) == {"a": "w.a", "b": "w.b"}


def test_a_tensor_of_another_shape_has_the_name_that_its_neighbours_have():
    base = tensors(*under("model."), ("model.embed.weight", (9, 2)))
    task = tensors(*under("model.language_model."), ("model.language_model.embed.weight", (11, 2)))
    found = align(base, task)
    assert found.names["model.language_model.embed.weight"] == "model.embed.weight"
    assert "model.language_model.embed.weight" not in found.matched


def test_two_names_never_fall_on_one():
    """The wrapped one has it; the other keeps its own."""
    base, task = tensors("a.w", "b.w"), tensors("m.a.w", "m.b.w", "a.w")
    assert aligned(base, task) == {"m.a.w": "a.w", "m.b.w": "b.w", "a.w": "//a.w"}
    assert aligned(base, tensors("a.w", "m.a.w", "m.b.w", "//a.w")) == {
        "m.a.w": "a.w", "m.b.w": "b.w", "a.w": "//a.w", "//a.w": "////a.w",
    }  # fmt: skip


# Several renames


@pytest.mark.parametrize("turned", [False, True], ids=["old base", "new base"])
def test_the_parts_of_a_model_are_renamed_each_for_itself(turned):
    """Move names as transformers 4.52 did in LLaVA."""
    old = (
        *under("vision_tower.vision_model."), *under("language_model.model."), "language_model.lm_head.weight",
        "multi_modal_projector.linear.weight",
    )  # fmt: skip
    new = (
        *under("model.vision_tower."), *under("model.language_model."), "lm_head.weight",
        "model.multi_modal_projector.linear.weight",
    )  # fmt: skip
    base, task = (new, old) if turned else (old, new)
    found = align(tensors(*base), tensors(*task))
    assert found.names == dict(zip(task, base)) and found.matched == set(task) and not found.unclear


@pytest.mark.parametrize("layers", [3, 126])
def test_segments_between_numbers_are_dropped_and_put_in(layers):
    base = tensors(*(f"layers.{i}.attn.{j}.weight" for i in range(layers) for j in range(3)))
    task = tensors(*(f"layers.{i}.wrapped.attn.{j}.weight" for i in range(layers) for j in range(3)))
    assert list(aligned(base, task).items()) == list(zip(task, base))
    assert list(aligned(task, base).items()) == list(zip(base, task))


@pytest.mark.parametrize(
    ("own", "of_base"),
    [
        ("layer.0._orig_mod.attn.weight", "layer.0.attn.weight"),
        ("_fsdp_wrapped_module.layer.0._checkpoint_wrapped_module.attn.weight", "layer.0.attn.weight"),
        ("a.LayerNorm.gamma", "a.LayerNorm.weight"),
        ("a.LayerNorm.bias", "a.LayerNorm.beta"),
        ("conv.parametrizations.weight.original0", "conv.weight_g"),
        ("conv.weight_v", "conv.parametrizations.weight.original1"),
    ],
)
def test_what_wrappers_and_versions_of_torch_write_is_one_name(own, of_base):
    assert aligned(tensors("embed.weight", of_base), tensors("embed.weight", own))[own] == of_base


def test_names_that_would_be_spelled_alike_stay_apart():
    names = ("a._orig_mod.w", "a.w", "b.w")
    assert aligned(tensors(*names), tensors(*names)) == {name: name for name in names}


def test_the_names_of_other_versions_of_transformers_are_known_by_the_type_of_the_model():
    files = [f"vit.encoder.layer.{i}.attention.attention.{part}.weight" for i in range(3) for part in ("query", "key")]
    model = [f"vit.layers.{i}.attention.{part}_proj.weight" for i in range(3) for part in ("q", "k")]
    assert aligned(tensors(*files), tensors(*model), model_types=("vit",)) == dict(zip(model, files))
    assert aligned(tensors(*model), tensors(*files), model_types=("vit",)) == dict(zip(files, model))
    assert not align(tensors(*files), tensors(*model)).matched


# What is not taken


BOTH = (*under("vision_model."), *under("text_model."))


def test_a_tower_is_never_renamed_to_another():
    assert not align(tensors(*under("text_model.")), tensors(*under("vision_model."))).matched


def test_names_that_fit_two_towers_are_not_guessed():
    found = align(tensors(*BOTH), tensors(*TOWER))
    assert not found.matched and len(found.unclear) == 2
    assert {str(rename) for rename in found.unclear} == {"`*` as `vision_model.*`", "`*` as `text_model.*`"}


@pytest.mark.parametrize(("kind", "tower"), [("SiglipVisionModel", "vision_model."), ("CLIPTextModel", "text_model.")])
def test_the_class_of_the_model_says_which_tower_it_is(kind, tower):
    assert aligned(tensors(*BOTH), tensors(*TOWER), kind=kind) == dict(zip(TOWER, under(tower)))
    other = "text_model." if tower == "vision_model." else "vision_model."
    assert not align(tensors(*under(other)), tensors(*TOWER), kind=kind).matched


def test_tensors_that_only_one_tower_has_decide():
    task = (*TOWER, "embeddings.patch.weight")
    found = aligned(tensors(*BOTH, "vision_model.embeddings.patch.weight"), tensors(*task))
    assert found == dict(zip(task, under("vision_model.", task)))


def test_of_two_copies_in_a_task_neither_is_guessed():
    base = tensors(*TOWER)
    assert len(align(base, tensors(*under("student."), *under("teacher."))).unclear) == 2
    kept = align(base, tensors(*under("model."), *under("ema.")))
    assert all(kept.names[own] == name for own, name in zip(under("model."), TOWER)) and not kept.unclear


def test_a_head_is_not_taken_for_another_of_its_shape():
    """Its last segments and its shape are those of a layer that the base alone has."""
    base = tensors(*TOWER, ("cls.predictions.transform.dense.weight", (4, 4)))
    found = align(base, tensors(*TOWER, ("dense.weight", (4, 4)), ("head.dense.weight", (4, 4))))
    assert found.names["dense.weight"] == "dense.weight" and found.names["head.dense.weight"] == "head.dense.weight"


NAMES = st.lists(st.text("ab.1", min_size=1, max_size=9), min_size=1, max_size=8, unique=True)


@given(NAMES, NAMES)
@example(["..."], [".", ".."])
def test_names_are_aligned_one_to_one_whatever_they_are(base_names, task_names):
    base, task = tensors(*base_names), tensors(*task_names)
    found = align(base, task, model_types=("vit", "llava"))
    assert set(found.names) == set(task)
    assert len(set(found.names.values())) == len(task)
    assert all(found.names[own] in base for own in found.matched)


@given(
    st.lists(
        st.text("abc.", min_size=1, max_size=7).map(lambda name: f"{name}.w"), min_size=1, max_size=8, unique=True
    ),
    st.sampled_from(["p.", "p.q.", "x.y.z."]),
    st.booleans(),
)
def test_no_prefix_matches_more(names, prefix, wrap_base):
    """Against a search over every prefix of either side; or two are as good, and none is taken."""
    base, task = tensors(*names), tensors(*(prefix + name for name in names))
    if wrap_base:
        base, task = task, base
    found = align(base, task)
    starts = {name[: cut + 1] for name in [*base, *task] for cut, letter in enumerate(name) if letter == "."} | {""}
    most = max(
        max(sum(name.startswith(start) and name[len(start) :] in base for name in task) for start in starts),
        max(sum(start + name in base for name in task) for start in starts),
    )
    assert len(found.matched) >= most or found.unclear


def test_a_name_of_many_dots_is_not_looked_at_dot_by_dot():
    def run(dots):
        base, task = tensors("." * dots, "a"), tensors("." * (dots + 1), "a")
        return num_calls(lambda: align(base, task))

    assert run(1_000_000) == run(10_000)


def test_models_that_have_nothing_in_common_take_a_look_up_per_name_and_layer():
    def calls(experts):
        names = [f"layers.{i}.experts.{e}.w.weight" for i in range(4) for e in range(experts)]
        return num_calls(
            lambda: align(tensors(*(f"x.{name}" for name in names)), tensors(*(f"y.{name}" for name in names)))
        )

    assert calls(200) < 6 * calls(50)
