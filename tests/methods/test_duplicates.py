"""Warnings for groups of near-duplicates."""

import pytest

from flexmerge_cli.methods.duplicates import copies_factor, near_duplicate_warning
from flexmerge_cli.methods.registry import all_methods, make_call, parse_call

from .driver import family_of, merge
from .golden import is_merging


@pytest.mark.parametrize(
    ("text", "num_tasks", "warns"),
    [
        ("task_arithmetic:form=sum", 6, None),  # 6 · 0.3
        ("task_arithmetic:form=sum", 7, "by about 2.1; take form=mean"),
        ("task_arithmetic:form=sum,scale=1.0", 3, "by about 3"),
        ("task_arithmetic", 100, None),
        ("average", 100, None),
        ("weighted_average:normalize=false", 3, "by about 3; take normalize=true"),
        ("weighted_average:normalize=false,weights={a: 0.1, b: 0.1}", 3, None),
        ("weighted_average", 100, None),
        ("ties:merge=sum", 3, "take merge=mean"),
        ("ties", 100, None),
        ("breadcrumbs", 7, "take merge=mean"),
        ("breadcrumbs:merge=mean", 100, None),
        ("tall_masks", 2, None),  # copies
        ("tall_masks", 3, "by about 3; take consensus"),
        ("tall_masks", 4, "nearly empty masks"),
        ("tall_masks:lam=0.1,scale=0.1", 10, None),
        ("consensus", 100, None),
        ("consensus_original", 4, "removes nearly everything"),
        ("consensus_original:kappa=0,scale=1.0", 4, "by about 4"),
        ("emr", 100, None),
    ],
)
def test_sums_and_masks_of_sums_are_warned_of(text, num_tasks, warns):
    tasks = [chr(ord("a") + number % 26) for number in range(num_tasks)]
    found = near_duplicate_warning(parse_call(text), tasks, 0.95)
    assert (found is None) if warns is None else (warns in found)
    assert near_duplicate_warning(parse_call(text), tasks, 0.89) is None


@pytest.mark.parametrize(
    "name", [name for name in all_methods() if is_merging(name) and all_methods()[name].form != "masked"]
)
def test_a_method_without_a_warning_does_not_multiply_near_duplicates_of_a_vector(name):
    """Four all but equal tasks: at most the tolerated factor, which of spectral methods matrices alone exceed."""
    call = make_call(all_methods()[name], {"steps": 1} if name == "wudi" else {})
    family = family_of({"w": [[0.5, -0.25, 0.125 + i / 1024] for i in range(4)]})
    merged = merge(family, call)["w"].unified
    assert (merged.abs().max() / 0.5).item() <= 2.0 or near_duplicate_warning(call, "abcd", 0.99)
    assert copies_factor(call, "abcd") <= 2.0 or near_duplicate_warning(call, "abcd", 0.99)
