import inspect

import pytest
import torch

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods import coded, free
from flexmerge_cli.methods.coded import declare
from flexmerge_cli.methods.registry import make_call
from flexmerge_cli.residuals.coder import num_bytes
from flexmerge_cli.residuals.low_bit import LowBit, weight_code

METHODS = [coded.bitdelta, coded.low_bit, coded.low_rank, coded.smile, coded.tsv_c, coded.sparse, free.free]
MATRIX = (64, 32)


def stored(method, **args):
    return declare(make_call(method, args))


def form(method, shape, num_tasks, dtype="BF16", **args):
    return stored(method, **args).form("layer.weight", shape, (dtype,) * num_tasks)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_run_without_arguments_and_tell_what_they_are(method):
    assert form(method, MATRIX, 8).residual is not None
    assert method.summary
    assert method.when
    assert make_call(method, {}).scope in ("row", "tensor")
    assert set(method.parameters) == set(inspect.signature(method.function).parameters)


@pytest.mark.parametrize(
    ("method", "args", "says"),
    [
        (coded.low_bit, {"bits": 9}, r"bits=9 is not an integer in \[1, 8\]"),
        (coded.low_bit, {"bits": 4, "levels": "empirical"}, "at most 3 bits"),
        (coded.low_bit, {"centre_bits": 5}, "not one of 2, 3, 4, 8, dense"),
        (coded.low_bit, {"centre_bits": 9}, "centre_bits=9 is not"),
        (coded.low_bit, {"centre": "none", "gain": "norm"}, "have no effect with centre=none"),
        (coded.low_bit, {"centre": "none", "centre_bits": 4}, "have no effect with centre=none"),
        (coded.low_bit, {"centre": "emr"}, "more than one dense value"),
        (coded.low_bit, {"centre": "averag"}, "no method `averag`"),
        (coded.bitdelta, {"centre": "none"}, "centre=none leaves nothing"),
        (coded.low_rank, {"rank": 3, "fraction": 0.5}, "both given"),
        (coded.low_rank, {"rank": 0}, "rank=0 is not"),
        (coded.sparse, {"density": 0}, "density=0 is not"),
        (coded.sparse, {"rescale": "l3"}, "rescale='l3' is not one of none, l1, l2"),
        (free.free, {"mu": -1.0}, "mu=-1.0 is not"),
        (free.free, {"mu": "both"}, "mu='both' is not one of code, paper or a number"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(method, args, says):
    with pytest.raises(UsageError, match=says):
        make_call(method, args)


def test_other_methods_are_no_coded_ones():
    from flexmerge_cli.methods.registry import parse_call

    assert declare(parse_call("average")) is None


def test_a_centre_is_a_method_with_its_arguments():
    centre = stored(coded.low_bit, centre="ties:K=0.2,scope=block").centre_call()
    assert (centre.method.name, centre.args["K"], centre.args["scope"]) == ("ties", 0.2, "block")


def test_arguments_of_fr_reach_the_centre_of_free():
    centre = stored(free.free, variant="code", cutoff=0.5, scale=0.3, others="base").centre_call()
    assert centre.method.name == "fr"
    assert {**centre.args, "coef": "eq3"} == centre.args
    assert [centre.args[name] for name in ("variant", "cutoff", "scale", "others")] == ["code", 0.5, 0.3, "base"]


def test_vectors_are_copies_unless_the_centre_is_coded():
    assert form(coded.low_bit, (64,), 8).residual is None
    on_coded = form(coded.low_bit, (64,), 8, bits=1, centre_bits=4)
    assert (on_coded.residual, on_coded.centre) == (weight_code(8), weight_code(8))
    assert form(free.free, (640,), 8).residual is not None


def test_a_coded_centre_has_its_own_bits_and_no_gain():
    found = form(coded.low_bit, MATRIX, 8, bits=1, gain="norm", centre_bits=4, scales="bfloat16", clip="search")
    assert found.centre == weight_code(4)
    assert found.residual == LowBit(bits=1, gain="norm", scales="bfloat16", clip="search")
    assert num_bytes(found.residual.parts(found.matrix, "BF16")) == 64 * 2 + 64 * 4


def test_leading_axes_of_one_are_dropped_where_a_uniform_plan_shares_the_codes_of_auto():
    shape = (1, 17, 64)
    assert form(coded.low_bit, shape, 8).matrix == (1, 17 * 64)
    assert form(coded.low_bit, shape, 8, centre_bits=4).matrix == (17, 64)
    assert form(coded.low_bit, shape, 8, centre="none").matrix == (17, 64)


@pytest.mark.parametrize(
    ("method", "args", "num_tasks", "copies"),
    [
        (coded.tsv_c, {}, 2, True),  # two factors of half the rank each are as large as a square matrix
        (coded.tsv_c, {}, 3, False),
        (coded.low_bit, {"bits": 8}, 2, True),
        (coded.low_bit, {"bits": 8}, 3, False),
        (coded.low_bit, {"bits": 8, "centre": "base"}, 1, False),
        (coded.low_bit, {"bits": 2}, 2, False),
        (coded.low_rank, {"fraction": 1.0, "centre": "base"}, 9, True),
    ],
)
def test_copies_are_stored_where_they_are_no_larger(method, args, num_tasks, copies):
    assert (form(method, (64, 64), num_tasks, **args).residual is None) == copies


def test_tasks_of_several_dtypes_are_priced_each_in_its_own():
    low_rank = stored(coded.low_rank, rank=2)
    found = low_rank.form("layer.weight", (64, 64), ("BF16", "F16", "BF16"))
    assert coded.residual_bytes(found, ("BF16", "F16", "F32")) == 2 * 128 * (2 + 2 + 4)
    assert low_rank.centre_bytes(found, ("BF16", "F16")) == 4 * 64 * 64  # the least dtype that holds both
    assert low_rank.centre_bytes(found, ("BF16", "BF16")) == 2 * 64 * 64


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), ()])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_tensors_with_nothing_to_code_are_copies(method, shape):
    found = form(method, shape, 3)
    assert found.residual is None or coded.residual_bytes(found, ("BF16",) * 3) < 6


def test_sparse_by_row_is_magnitude_pruning_of_each_row():
    """As in FusionBench, the smallest int(n·prune_ratio) of every row become 0."""
    residual = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[:, None]
    found = form(coded.sparse, (6, 40), 4, "F32", density=0.25, select="row", centre="base")
    decoded = found.residual.decode(found.residual.encode(residual, "F32"), found.matrix, "F32")
    pruned = residual.clone()
    pruned.scatter_(1, residual.abs().argsort(1)[:, : int(40 * 0.75)], 0.0)
    assert torch.equal(torch.from_numpy(decoded), pruned)
