"""`NAME[:key=value,…]`: what is read, what is refused and how, and the names that mergekit has."""

import re

import pytest

from flexmerge_cli.calibration.tuners import TUNERS
from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.absent import _OTHER_NAMES, ABSENT, explain_absent
from flexmerge_cli.methods.aliases import ALIASES, resolve_alias
from flexmerge_cli.methods.registry import (
    all_methods,
    all_steps,
    complete,
    parse_calibrate,
    parse_call,
    parse_step,
    split_call,
)
from flexmerge_cli.methods.use import parse_use


@pytest.mark.parametrize(
    ("text", "name", "args"),
    [
        ("average", "average", {}),
        ("ties:K=0.2,scope=block", "ties", {"K": 0.2, "scope": "block"}),
        (" ties: K = 1 , merge = sum ", "ties", {"K": 1.0, "merge": "sum"}),
        ("wudi:lr=1e-5,steps=20", "wudi", {"lr": 1e-5, "steps": 20}),
        ("weighted_average:weights={a: 1e-3, b: 2},normalize=false", "weighted_average", {"normalize": False}),
        ("task_arithmetic:scale=null", "task_arithmetic", {"scale": None, "form": "mean"}),
        ("consensus_original:on=ties,kappa=0", "consensus_original", {"on": "ties", "kappa": 0}),
    ],
)
def test_a_call_is_read(text, name, args):
    call = parse_call(text)
    assert call.method is all_methods()[name]
    assert {key: call.args[key] for key in args} == args
    assert list(call.args) == list(call.method.parameters)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("tie", "no method `tie`", "did you mean `ties`"),
        ("zzz", "no method `zzz`", "`flexmerge methods` lists"),
        ("dare", "`dare` is a step, not a method", "write --step dare"),
        ("trim", "`trim` is a step, not a method", "write --step trim"),
        ("svc", "`svc` is a calibration, not a method", "write --calibrate svc"),
        ("trimm", "no method `trimm`", "did you mean the step `trim`?"),
        ("aut", "no method `aut`", "did you mean `auto`"),
        ("auto", "`auto` chooses for the whole bundle", "--method auto"),
        ("auto,ties", "no method `auto,ties`", "several: --method auto --method ties"),
        ("own/median.py:median", "cannot read `median`", "./own/median.py#median"),
        ("ties:k=0.2", "no argument `k`", "did you mean `K`|takes: K"),
        ("ties:K=0", "K=0 is not a number in \\(0, 1\\]", None),
        ("ties:K=1.5", "K=1.5 is not", None),
        ("ties:K=true", "K=True is not", None),
        ("ties:K=.inf", "K=inf is not", None),
        ("ties:K=.nan", "K=nan is not", None),
        ("ties:merge=median", "merge='median' is not one of mean, sum, max", None),
        ("ties:K", "cannot read `K`", "key=value"),
        ("ties:K=1,K=0.5", "cannot read `K=0.5`", None),
        ("ties:K={", "not a valid YAML value", None),
        ("wudi:steps=0", "steps=0 is not an integer in", None),
        ("wudi:steps=2.5", "steps=2.5 is not an integer", None),
        ("average:scale=1", "`average` has no argument `scale`", "takes: none"),
        ("weighted_average:weights={a: -1}", "weight of `a` is -1", None),
        ("weighted_average:weights={a: x}", "weight of `a` is 'x'", None),
        ("weighted_average:weights=3", "weights=3 is not a map", None),
        (f"weighted_average:weights={{a: {1 << 63}}}", "weight of `a` is 9223372036854775808, not", None),
        (f"weighted_average:weights={{a: 1{400 * '0'}}}", "weight of `a` is 10{99}, not a number", None),
        (f"randes:seed={1 << 63}", "seed=9223372036854775808 is not an integer in", "methods randes"),
        (f"ties:K=1{400 * '0'}", "K=10{99} is not a number in", None),
        ("della:p=0.1,window=0.3", "window=0.3 does not fit p=0.1", "below 0.2"),
        ("swudi:ratio=0", "ratio=0 is not", None),
        ("fr:cutoff=1.5", "cutoff=1.5 is not a number in \\[0, 1.5\\)", None),
    ],
)
def test_what_cannot_be_meant_is_refused(text, message, hint):
    with pytest.raises(UsageError, match=message) as raised:
        parse_call(text)
    assert hint is None or re.search(hint, raised.value.hint)


def test_steps_and_calibrations_are_read_and_refused():
    assert parse_step("dare:p=0.5,seed=7").args == {"p": 0.5, "seed": 7, "rescale": True}
    assert parse_step("breadcrumbs:scope=row").step.name == "breadcrumbs"
    assert parse_calibrate("svc:alpha=1").args == {"alpha": 1.0, "matrices": "linear"}
    with pytest.raises(UsageError, match="`average` is a method, not a step"):
        parse_step("average")
    with pytest.raises(UsageError, match="p=1 is not a number in \\[0, 1\\)"):
        parse_step("dare:p=1")
    with pytest.raises(UsageError, match="window"):
        parse_step("magprune:p=0.9,window=0.2")
    with pytest.raises(UsageError, match="no calibration `svd`") as raised:
        parse_calibrate("svd")
    assert raised.value.hint == "did you mean `svc`?"


def test_calibration_after_equal_singular_values_or_masks_is_refused_with_the_reason():
    svc = parse_calibrate("svc")
    svc.require_after(parse_call("tsv_m"))
    for name in ("iso_c", "iso_cts"):
        with pytest.raises(UsageError, match="singular values are equal") as raised:
            svc.require_after(parse_call(name))
        assert raised.value.exit_code == 2
    with pytest.raises(UsageError, match="gives each task its own"):
        svc.require_after(parse_call("emr"))


@pytest.mark.parametrize("name", ALIASES)
def test_what_mergekit_calls_a_method_is_one_of_ours_after_steps(name):
    alias = resolve_alias(name.replace("_", "-").upper())
    parse_call(alias.method)
    for step in alias.steps:
        parse_step(step)
    assert f"--method {alias.method}" in alias.message
    assert all(f"--step {step}" in alias.message for step in alias.steps)


def test_an_unknown_name_of_mergekit_is_a_hint():
    assert resolve_alias("slerp") is None
    with pytest.raises(UsageError, match="no method `dare_ties`") as raised:
        parse_call("dare_ties")
    assert "--step dare" in raised.value.hint


FUSION_BENCH = """
simple_ensemble weighted_ensemble max-model_predictor simple_averaging weighted_averaging slerp
task_arithmetic ties_merging dare fisher_merging regmean regmean_plusplus adamerging
clip_concrete_task_wise_adamerging concrete_subspace ada_svd task_singular_vector isotropic_merging iso_c
iso_cts opcm emr_merging tall_mask magmax model_stock doge_ta dop gossip fw_merging fw_hard fw_soft
wudi_merging randes singular_value_calibration surgery trust_region pwe_moe rankone_moe weight_ensembling_moe
sparse_we_moe smile_upscaling dawe depth_upscaling moe_based_merging moe_based_upscaling moe_pruner
expert_sparsity model_recombination layer_recombination bitdelta magnitude_pruning sparselo_pruning wanda
sparsegpt
"""
"""The pages of its algorithms, and the names of their configurations."""


@pytest.mark.parametrize("name", FUSION_BENCH.split())
def test_every_name_of_fusion_bench_is_known_or_explained(name):
    here = name in all_methods() or name in all_steps()
    assert here is not (explain_absent(name) is not None)


@pytest.mark.parametrize("name", [*ABSENT, *_OTHER_NAMES])
def test_a_method_of_other_programs_is_explained_and_the_nearest_of_ours_runs(name):
    assert name not in all_methods() and resolve_alias(name) is None
    with pytest.raises(UsageError, match=f"no method `{re.escape(name)}`: it ") as raised:
        parse_call(name)
    *before, after = (raised.value.hint or "").split("--method ")
    words = after.split() if before else []
    if "--bundle" in words:
        called, args = split_call(words[0])
        assert TUNERS[called].adds_to_bundle and complete(called, TUNERS[called].parameters, args)
        words = ["average"]  # It is no method of `merge`.
    elif before and before[0].startswith("flexmerge tune "):
        assert before[1].split()[0] in TUNERS and words[0].startswith("weighted_average:weights=@coefficients.json")
        words = ["weighted_average:normalize=count"]  # There is no such file here.
    if words:
        parse_call(words[0])
        parse_use(words[0], steps=words[words.index("--step") + 1 :][:1] if "--step" in words else ())
    else:
        assert "flexmerge methods" in str(raised.value.hint) or str(raised.value.hint).startswith("flexmerge inspect ")
