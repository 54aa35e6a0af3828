"""`measuring` on small modules: what is allocated, and inputs that layers share."""

import pytest
import torch
from torch import nn

from flexmerge_cli.calibration import collect
from flexmerge_cli.calibration.collect import Wanted, measuring
from flexmerge_cli.errors import DataError


def wanted(model, *names):
    return [
        Wanted(tensor=f"{name}.weight", statistic="inputs", module=name, layout="linear",
               shape=tuple(model.get_submodule(name).weight.shape))
        for name in names
    ]  # fmt: skip


def test_a_sum_is_made_once(monkeypatch):
    model, made, zeros = nn.Sequential(nn.Linear(3, 2)), [], collect._Symmetric.zeros
    monkeypatch.setattr(collect._Symmetric, "zeros", lambda *shape: made.append(shape) or zeros(*shape))
    with measuring(model, wanted(model, "0"), task="a", seed=0) as found, torch.no_grad():
        for _ in range(4):
            model(torch.ones(5, 3))
        (one,) = found()
    assert len(made) == 1 and one.count == 20 and (one.array == 1).all()


class Pair(nn.Module):
    """Two layers, each of which gets one of the inputs; None: it does not run."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, query, key):
        self.query(query)
        if key is not None:
            self.key(key)


@pytest.mark.parametrize("second", [torch.zeros(2, 3), None], ids=["other inputs", "none"])
def test_layers_that_share_inputs_only_at_first_are_named(second):
    model, x = Pair(), torch.ones(2, 3)
    with measuring(model, wanted(model, "query", "key"), task="a", seed=0) as found, torch.no_grad():
        model(x, x)
        assert [one.of for one in found()] == [None, "query.weight"]
        with pytest.raises(DataError, match=r"`query.weight` and `key.weight`") as caught:
            model(x, second)
            found()
    assert "--statistics" in caught.value.hint


def test_layers_that_share_inputs_only_later_have_sums_of_their_own():
    model, x = Pair(), torch.ones(2, 3)
    with measuring(model, wanted(model, "query", "key"), task="a", seed=0) as found, torch.no_grad():
        model(x, torch.zeros(2, 3))
        model(x, x)
        one, other = found()
    assert (one.of, other.of) == (None, None) and (one.array == 1).all() and (other.array == 0.5).all()
