"""One pass over the weights: what it measures is what slow code measures, however it was cut."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.engine.survey import survey
from flexmerge_cli.engine.survey_item import PRODUCT_ELEMENTS, SurveyItem, range_of

from ..families import normal

CPU = torch.device("cpu")
SIZES = (0, 1, 2, 99, PRODUCT_ELEMENTS - 1, PRODUCT_ELEMENTS, PRODUCT_ELEMENTS + 1, 3 * PRODUCT_ELEMENTS + 17)


def item(tmp_path, base, tasks, *, gram=True, name="w"):
    """One tensor of a base and tasks, each in a file of its own."""
    stored = []
    for number, value in enumerate([*tasks, base]):
        path = tmp_path / f"{name}-{number}.safetensors"
        save_file({"w": value.contiguous()}, path)
        stored.append(read_header(path)[0]["w"])
    base_stored = stored.pop()
    return SurveyItem(name=name, base=base_stored if gram else None, tasks=tuple(enumerate(stored)), gram=gram)


def measured(found):
    """All of a measure, comparable."""
    return (
        found.digests, found.base_digest, found.same, found.is_base, found.not_finite, found.base_energy,
        None if found.gram is None else found.gram.tolist(),
        None if found.agreement is None else found.agreement.tolist(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_gram_is_that_of_the_float32_task_vectors(size, dtype, tmp_path):
    base = normal(0, size, dtype=dtype)
    tasks = [(base.float() + 0.05 * normal(seed, size)).to(dtype) for seed in (1, 2, 3)]
    (found,) = survey([item(tmp_path, base, tasks)], device=CPU, threads=2, signs=True)
    deltas = torch.stack([(task.float() - base.float()).double() for task in tasks]).reshape(3, size)
    expected = (deltas @ deltas.T).numpy()
    # Products of 2^16 elements in float32: each is off by a few units of 2^-24 of the norms.
    norms = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert np.all(np.abs(found.gram - expected) <= 1e-6 * norms)
    if size < PRODUCT_ELEMENTS:
        assert np.allclose(found.gram, expected, rtol=1e-12, atol=1e-15)
    signs = torch.sign(deltas)
    assert np.array_equal(found.agreement, (signs[:, None] == signs[None]).sum(-1).numpy())
    assert np.isclose(found.base_energy, float(base.float().double().square().sum()), rtol=1e-5)
    assert found.digests == [digest_bytes(task.reshape(-1).view(torch.uint8).numpy().copy()) for task in tasks]
    assert np.array_equal(found.gram, found.gram.T)


@pytest.mark.parametrize(
    ("base", "task", "elements"),
    [
        (torch.float32, torch.float32, PRODUCT_ELEMENTS), (torch.float32, torch.bfloat16, PRODUCT_ELEMENTS),
        (torch.bfloat16, torch.bfloat16, 2 * PRODUCT_ELEMENTS), (torch.float64, torch.float64, PRODUCT_ELEMENTS),
    ],
)  # fmt: skip
def test_ranges_of_smaller_dtypes_have_more_elements(base, task, elements, tmp_path):
    made = item(tmp_path, normal(0, 9, dtype=base), [normal(1, 9, dtype=task)])
    assert range_of(made, PRODUCT_ELEMENTS) == elements


def test_nothing_depends_on_threads_or_on_how_tensors_are_cut(tmp_path):
    sizes = (3 * PRODUCT_ELEMENTS + 17, 5, 0, PRODUCT_ELEMENTS)
    items = []
    for number, size in enumerate(sizes):
        base = normal(number, size)
        tasks = [base + 0.05 * normal(10 * number + seed, size) for seed in (1, 2)]
        items.append(item(tmp_path, base, [*tasks, tasks[0]], name=f"w{number}"))
    results = [
        [measured(m) for m in survey(items, device=CPU, threads=threads, signs=True, chunk_elements=chunk)]
        for threads in (1, 2, 5)
        for chunk in (PRODUCT_ELEMENTS, 2 * PRODUCT_ELEMENTS, 64 * PRODUCT_ELEMENTS)
    ]
    assert all(result == results[0] for result in results)


def test_the_same_bits_are_found_and_nothing_else(tmp_path):
    """-0 is not 0; NaN is itself; a difference in the last element of the last range is one."""
    size = 2 * PRODUCT_ELEMENTS + 3
    base = normal(0, size)
    last = base.clone()
    last[-1] += 1
    zero, negative = base.clone(), base.clone()
    zero[5], negative[5] = 0.0, -0.0
    tasks = [base, last, base.clone(), zero, negative, last.clone()]
    (found,) = survey([item(tmp_path, base, tasks)], device=CPU, threads=2, chunk_elements=PRODUCT_ELEMENTS)
    assert found.same == [0, 1, 0, 3, 4, 1]
    assert found.is_base == [True, False, True, False, False, False]
    nan = torch.full((4,), float("nan"))
    (found,) = survey([item(tmp_path, nan, [nan, nan.clone()], gram=False)], device=CPU, threads=1)
    assert found.same == [0, 0]
    assert found.not_finite == [(0, 0), (1, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_task_in_another_dtype_is_the_base_if_a_cast_gives_its_bits(dtype, tmp_path):
    """Readers cast by way of float32. One value in the last range, and the sign of a zero, make a difference."""
    size = 2 * PRODUCT_ELEMENTS + 3
    base = normal(0, size).to(dtype)
    base[7] = 0.0
    tasks = []
    for other in (torch.float32, torch.bfloat16, torch.float16):
        tasks += [base.float().to(other).clone() for _ in range(3)]
        tasks[-2][-1] += 1
        tasks[-1][7] = -0.0
    for chunk in (PRODUCT_ELEMENTS, 4 * PRODUCT_ELEMENTS):
        (found,) = survey([item(tmp_path, base, tasks)], device=CPU, threads=1, chunk_elements=chunk)
        assert found.is_base == [True, False, False] * 3


def test_equal_in_different_ranges_is_not_equal(tmp_path):
    """c is a in its first range and b in its second."""
    a, b = normal(1, 2 * PRODUCT_ELEMENTS), normal(2, 2 * PRODUCT_ELEMENTS)
    c = torch.cat([a[:PRODUCT_ELEMENTS], b[PRODUCT_ELEMENTS:]])
    (found,) = survey([item(tmp_path, a, [a, b, c])], device=CPU, threads=1, chunk_elements=PRODUCT_ELEMENTS)
    assert found.same == [0, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 7, PRODUCT_ELEMENTS + 5])
def test_what_is_not_finite_is_found_where_it_is(bad, place, tmp_path):
    base = normal(0, PRODUCT_ELEMENTS + 9)
    sound, broken = base + 1, base.clone()
    broken[place] = bad
    (found,) = survey([item(tmp_path, base, [sound, broken])], device=CPU, threads=2)
    assert found.not_finite == [(1, place)]
    (found,) = survey([item(tmp_path, broken, [sound, sound + 1])], device=CPU, threads=2)
    assert found.not_finite == [(-1, place)]


def test_large_numbers_are_no_infinity(tmp_path):
    """1e30 squared is more than float32 holds."""
    size = PRODUCT_ELEMENTS
    base, task = torch.zeros(size), torch.full((size,), 1e30)
    (found,) = survey([item(tmp_path, base, [task, -task])], device=CPU, threads=1)
    assert found.not_finite == []
    assert np.allclose(found.gram, size * float(task[0]) ** 2 * np.array([[1, -1], [-1, 1]]), rtol=1e-6)


def test_the_pass_tells_every_byte_once(tmp_path):
    told = []
    items = [item(tmp_path, normal(0, 100_000), [normal(1, 100_000), normal(2, 100_000)])]
    survey(items, device=CPU, threads=2, chunk_elements=PRODUCT_ELEMENTS, on_bytes=told.append)
    assert sum(told) == 3 * 4 * 100_000
