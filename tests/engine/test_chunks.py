"""The same bytes of every file, manifest included, however tensors are cut and however many threads there are."""

import numpy as np
import pytest
import torch

from flexmerge_cli.engine import runs
from flexmerge_cli.engine.runs import RUN_ELEMENTS

from ..families import Models, normal, tuned
from ..program import tree
from .merges import DEFAULTS, WHOLE, billed, plan_of, planned, write

ROWS_AND_BLOCKS = (
    "breadcrumbs:scope=row", "model_stock:scope=row", "sce:scope=row", "della:scope=tensor", "ties:K=0.3,scope=block",
    "pcb:scope=model", "pcb:scope=whole", "emr:gamma=tensor_mean", "consensus:K=0.3", "bitdelta:scale=row,centre=della",
    "low_bit:levels=empirical", "low_bit:bits=3,centre=opcm", "low_bit:centre_bits=4", "low_bit:bits=4,centre=none",
    "sparse:centre=iso_c", "free:select=row,mu_scope=model",
)  # fmt: skip
GROUPS = ([(0, 1, 2, 3)], [(0, 2, 3), (1,)], [(0, 1), (2, 3)])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Tensors of more than 2^16 elements in odd rows, a long vector in bfloat16, magnitudes that are often equal."""
    shapes = {
        "embeddings.word_embeddings.weight": (701, 11),
        "encoder.layer.0.attention.self.query.weight": (37, 33),
        "encoder.layer.0.attention.self.query.bias": (1,),
        "encoder.layer.0.intermediate.dense.weight": (130, 515),
        "encoder.layer.0.intermediate.dense.bias": (515,),
        "encoder.layer.1.conv.weight": (9, 5, 3, 7),
        "encoder.layer.1.intermediate.dense.weight": (70_001,),
    }
    base = {name: normal(number, *shape) for number, (name, shape) in enumerate(shapes.items())}
    base["encoder.layer.1.intermediate.dense.weight"] = base["encoder.layer.1.intermediate.dense.weight"].bfloat16()
    models = Models(base=base, tasks={f"task{n}": tuned(base, n + 1) for n in range(4)})
    for number, state in enumerate(models.tasks.values()):
        name = "encoder.layer.0.intermediate.dense.weight"
        state[name] = base[name] + (normal(90 + number, *shapes[name]) * 8).round() / 64
        state["classifier.weight"] = normal(number, 9 + 70_000 * (number % 2), 1)
    return planned(tmp_path_factory.mktemp("large"), models)


@pytest.mark.parametrize("method", [*DEFAULTS.values(), *ROWS_AND_BLOCKS])
def test_a_bundle_is_the_same_for_any_chunk_size_and_number_of_threads(method, large, tmp_path):
    plan = plan_of(large)
    groups = [GROUPS[index % 3] for index in range(len(plan.blocks))]
    layout, first = billed(plan, method, groups=groups), None
    for chunk_elements, threads in ((1024, 3), (65536, 3), (WHOLE, 1)):
        target = tmp_path / f"{chunk_elements}-{threads}"
        files = tree(write(large, layout, target, threads=threads, chunk_elements=chunk_elements))
        first = first or files
        assert files == first, (chunk_elements, threads)


@pytest.mark.parametrize("sums", [runs.squares, runs.sizes])
@pytest.mark.parametrize("run", [1, 8, 257, RUN_ELEMENTS, 3000])
def test_a_sum_over_runs_does_not_show_how_it_was_cut(sums, run):
    """These are float64 bits, which a bundle's seven digits would hide."""
    length = 50_003 if run > 1 else 5_003
    values = torch.cat([normal(1, 3, length), normal(1, 3, length)])
    whole = sums(values, run)
    assert whole.shape == (6, -(-length // run))
    assert np.array_equal(whole[:3], whole[3:])
    term = values.double().square() if sums is runs.squares else values.double().abs()
    assert whole.sum(1) == pytest.approx(term.sum(1).numpy(), rel=1e-7)
    for step in (run, 8 * run):
        parts = [sums(values[:, low : low + step], run) for low in range(0, length, step)]
        assert np.array_equal(np.concatenate(parts, axis=1), whole)
        total = 0.0
        for part in parts:
            total = runs.added(total, part[0])
        assert total == runs.added(0.0, whole[0])
