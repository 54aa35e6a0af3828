import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.family.align import align, aligned_names

from ..calls import num_calls


def tensors(*names, shape=(2,)):
    """Names, or (name, shape)."""
    pairs = [name if isinstance(name, tuple) else (name, shape) for name in names]
    return {name: StoredTensor(name=name, dtype="F32", shape=own, path=None, offset=0) for name, own in pairs}


def aligned(base, task):
    return aligned_names(align(base, task), base, task)


BODY = ("embed.weight", "layer.0.attn.weight", "layer.0.mlp.weight")


def test_equal_names_need_no_prefix():
    found = align(tensors(*BODY), tensors(*BODY, "classifier.weight"))
    assert (found.task_prefix, found.base_prefix, found.num_matched) == ("", "", 3)


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


@pytest.mark.parametrize("prefix", ["bert.", "model.language_model."])
def test_a_wrapper_of_the_base_is_added_and_only_to_what_the_base_has(prefix):
    base, task = tensors(*(prefix + name for name in BODY), "lm_head.weight"), tensors(*BODY, "classifier.weight")
    assert aligned(base, task) == {**{name: prefix + name for name in BODY}, "classifier.weight": "classifier.weight"}


def test_prefixes_are_whole_segments():
    """`roberta.` is no `berta.` with `ro` before it."""
    base, task = tensors("berta.a.weight", "berta.b.weight"), tensors("roberta.a.weight", "roberta.b.weight")
    assert align(base, task).num_matched == 0


def test_shapes_count():
    """The longer prefix has more names, the shorter one more tensors of equal shape."""
    base = tensors(("w.a", (2,)), ("w.b", (3,)), ("a", (9,)), ("b", (9,)))
    task = tensors(("w.a", (2,)), ("w.b", (3,)))
    found = align(base, task)
    assert (found.task_prefix, found.base_prefix, found.num_matched) == ("", "", 2)


def test_ties_go_to_the_shortest():
    base, task = tensors("x.w"), tensors("x.w", "p.x.w", "p.q.x.w")
    assert align(base, task).task_prefix == ""
    assert align(tensors("w"), tensors("p.w", "p.q.w")).task_prefix == "p."


def test_two_names_never_fall_on_one():
    """The wrapped one has it; the other keeps its own."""
    base, task = tensors("a.w", "b.w"), tensors("m.a.w", "m.b.w", "a.w")
    assert aligned(base, task) == {"m.a.w": "a.w", "m.b.w": "b.w", "a.w": "//a.w"}
    assert aligned(base, tensors("a.w", "m.a.w", "m.b.w", "//a.w")) == {
        "m.a.w": "a.w", "m.b.w": "b.w", "a.w": "//a.w", "//a.w": "////a.w",
    }  # fmt: skip


@given(
    st.lists(st.text("ab.", min_size=1, max_size=7), min_size=1, max_size=8, unique=True),
    st.lists(st.text("ab.", min_size=1, max_size=7), min_size=1, max_size=8, unique=True),
)
def test_names_are_aligned_one_to_one_whatever_they_are(base_names, task_names):
    base, task = tensors(*base_names), tensors(*task_names)
    found = aligned(base, task)
    assert set(found) == set(task)
    assert len(set(found.values())) == len(found)


@given(
    st.lists(
        st.text("abc.", min_size=1, max_size=7).map(lambda name: f"{name}.w"), min_size=1, max_size=8, unique=True
    ),
    st.sampled_from(["p.", "p.q.", "x.y.z."]),
    st.booleans(),
)
def test_no_prefix_matches_more(names, prefix, wrap_base):
    """Against a search over every prefix of either side."""
    base, task = tensors(*names), tensors(*(prefix + name for name in names))
    if wrap_base:
        base, task = task, base
    found = align(base, task)
    starts = {name[: cut + 1] for name in [*base, *task] for cut, letter in enumerate(name) if letter == "."} | {""}
    most = max(
        max(sum(name.startswith(start) and name[len(start) :] in base for name in task) for start in starts),
        max(sum(start + name in base for name in task) for start in starts),
    )
    assert found.num_matched == most


def test_a_name_of_many_dots_is_not_looked_at_dot_by_dot():
    def run(dots):
        base, task = tensors("." * dots, "a"), tensors("." * (dots + 1), "a")
        return num_calls(lambda: align(base, task))

    assert run(1_000_000) == run(1_000)
