"""`measuring` on small modules: what is allocated, and inputs that layers share."""

import torch
from torch import nn

from flexmerge_cli.calibration import collect
from flexmerge_cli.calibration.collect import Wanted, measuring


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
