"""What the pass measures for `auto` is what measuring the whole tensor at once gives, however it was cut."""

from dataclasses import replace

import pytest
import torch

from flexmerge_cli.engine.survey import survey
from flexmerge_cli.engine.survey_item import PRODUCT_ELEMENTS
from flexmerge_cli.methods.reductions import mean_tasks
from flexmerge_cli.residuals.coder import MatrixView
from flexmerge_cli.residuals.coding_error import CodingErrorSum

from ..families import normal
from .test_survey import item

CPU = torch.device("cpu")
# Rows within a range, across its end, longer than one, and of one element; vectors, scalars, leading axes, nothing.
SHAPES = [
    (300, 1000),
    (3, PRODUCT_ELEMENTS + 5),
    (2 * PRODUCT_ELEMENTS + 3,),
    (70_001, 1),
    (1, 17, 64),
    (),
    (0, 4),
    (4, 0),
]


def family(shape, dtype=torch.float32):
    base = normal(0, *shape, dtype=dtype)
    return base, [(base.float() + 0.05 * normal(seed, *shape)).to(dtype) for seed in (1, 2, 3)]


def at_once(name, base, tasks):
    matrix = MatrixView.SQUEEZED.matrix(tuple(base.shape))
    wide = torch.stack([task.float().reshape(matrix) for task in tasks])
    start = base.float().reshape(matrix)
    total = CodingErrorSum(name, matrix)
    if 0 not in matrix:
        rows = total.sampled
        average = start[rows] + mean_tasks(wide[:, rows] - start[rows]).float()
        residuals = (wide[:, rows] - average).transpose(0, 1).flatten(0, 1)
        total.add(total.measure(0, start, average, residuals))
    return total.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_those_of_the_whole_tensor(shape, dtype, tmp_path):
    base, tasks = family(shape, dtype)
    (found,) = survey([replace(item(tmp_path, base, tasks), codes=True)], device=CPU, threads=2)
    assert found.coding == at_once("w", base, tasks)


def test_nothing_depends_on_threads_or_on_how_tensors_are_cut(tmp_path):
    items = [
        replace(item(tmp_path, *family(shape), name=f"w{number}"), codes=True) for number, shape in enumerate(SHAPES)
    ]
    results = [
        [
            (m.coding, m.gram.tolist(), m.digests)
            for m in survey(items, device=CPU, threads=threads, chunk_elements=chunk)
        ]
        for threads in (1, 3)
        for chunk in (PRODUCT_ELEMENTS, 2 * PRODUCT_ELEMENTS, 64 * PRODUCT_ELEMENTS)
    ]
    assert all(result == results[0] for result in results)


def test_every_byte_is_told_once(tmp_path):
    base, tasks = family((300, 1000))
    told = []
    survey(
        [replace(item(tmp_path, base, tasks), codes=True)],
        device=CPU, threads=2, chunk_elements=PRODUCT_ELEMENTS, on_bytes=told.append,
    )  # fmt: skip
    assert sum(told) == 4 * 4 * base.numel()
