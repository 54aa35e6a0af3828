"""Every form answers the same questions, and tables alone know which forms there are."""

import pytest

from flexmerge_cli.formats.manifest_records import GroupEntry
from flexmerge_cli.methods.registry import all_methods, parse_call
from flexmerge_cli.stored.form import GroupTensor
from flexmerge_cli.stored.forms import FORMS, form_of, group_forms

METHODS = (
    "average",
    "emr",
    "consensus",
    "low_bit:bits=2",
    "low_bit:bits=2,centre=none",
    "sign_runs",
    "bitdelta",
    "sparse",
)


def group(method, dtypes=("F32",) * 4, shape=(6, 40), **more):
    same = tuple(range(len(dtypes)))
    return GroupTensor(call=parse_call(method), shape=shape, dtypes=dtypes, base_dtype="F32", same=same, **more)


def test_every_method_has_a_form_that_the_manifest_knows():
    for name, method in all_methods().items():
        assert method.form in FORMS and method.form != "copy", name
    for word in group_forms():
        assert GroupEntry(tasks=("a",), kind=word, method=None, distance={}).kind == word
    with pytest.raises(ValueError, match="no form `mask`; one of copy, merged, masked, superposed, residual"):
        GroupEntry(tasks=("a",), kind="mask", method=None, distance={})


@pytest.mark.parametrize("method", METHODS)
def test_every_task_that_is_no_copy_is_in_a_layout_once_and_it_is_smaller_than_copies(method):
    found = group(method)
    layout = form_of(found.call).layout(found)
    assert sorted(place for places, _ in layout.own for place in places) == [0, 1, 2, 3]
    assert layout.num_bytes < found.copies_bytes
    assert form_of(found.call).layout(group(method, dtypes=("F32",), shape=(1,))) is None


def test_tasks_with_equal_bits_of_one_tensor_share_arrays_and_exact_ones_have_none():
    found = group("low_bit:bits=2", bits=(2, 0, "exact", 4))
    layout = form_of(found.call).layout(found)
    assert [places for places, _ in layout.own] == [(0,), (1,), (3,)]
    assert [bool(arrays) for _, arrays in layout.own] == [True, False, True]
    twins = GroupTensor(
        call=found.call, shape=found.shape, dtypes=found.dtypes, base_dtype="F32", same=(0, 0, 2, 2), bits=(2, 2, 4, 8)
    )
    assert [places for places, _ in form_of(found.call).layout(twins).own] == [(0, 1), (2,), (3,)]
    assert form_of(found.call).layout(group("low_bit:bits=2", bits=("exact",) * 4)) is None


def test_factors_are_of_the_unit_and_of_methods_that_have_them():
    for method in METHODS:
        arrays = form_of(parse_call(method)).of_unit(parse_call(method))
        assert [array.role for array in arrays] == (["gamma"] if method == "emr" else [])
