"""A short soak; `python -m tests.soak` is the long one."""

import pytest

from ..soak import soak


@pytest.mark.slow
def test_many_connections_get_right_answers_in_level_memory_and_the_server_stops_cleanly(bundle_of):
    found = soak(bundle_of("mixed"), 240)
    assert (found.wrong, found.unanswered, found.code) == (0, 0, 0)
    assert found.counted >= 240
    assert found.mean_batch > 2
    assert len(found.tensors) == 1
    assert found.memory[-1] < found.memory[0] + (32 << 20)
