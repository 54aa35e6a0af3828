import numpy as np
import pytest

from flexmerge_cli.residuals import rows


@pytest.mark.parametrize(
    ("shape", "extra"),
    [((12, 4), 2), ((10, 4), 0), ((9, 4), 0), ((12, 5), 0), ((12,), 0), ((12, 4, 1), 0)],
)
def test_only_rows_at_the_end_are_extra(shape, extra):
    assert rows.extra_rows(shape, (10, 4)) == extra
    assert [part.shape for part in rows.parts(shape, (10, 4), "BF16")] == ([(extra, 4)] if extra else [])


def test_extra_rows_are_priced_in_the_tasks_dtype():
    (part,) = rows.parts((12, 4), (10, 4), "BF16")
    assert part.num_bytes == 16


def test_joining_gives_every_bit_back():
    whole = np.arange(48, dtype=np.uint16).reshape(12, 4)
    assert (rows.join(whole[:10], whole[10:]) == whole).all()
