import threading
import time

import pytest
import torch

from flexmerge_cli.engine.pool import Buffers, ordered_map

from ..calls import no_thread_outlives


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_come_in_the_order_of_the_items(threads):
    def work(item):
        time.sleep(0.002 * (5 - item % 5))
        return item * item

    with ordered_map(range(23), work, threads=threads) as results:
        assert list(results) == [item * item for item in range(23)]


def test_a_worker_multiplies_matrices_as_its_caller_does():
    """A new thread knew nothing of torch's one thread: products of it had other last bits until something told it."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((33, 37), (530, 701))]

    def gram(matrix):
        return matrix @ matrix.T

    for threads in range(1, 5):
        with ordered_map(matrices, gram, threads=threads) as results:
            assert all(torch.equal(found, gram(matrix)) for matrix, found in zip(matrices, results))


def test_nothing_comes_of_nothing():
    with ordered_map([], abs, threads=2) as results:
        assert list(results) == []


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (2, 1), (3, 4)])
def test_no_more_items_exist_than_the_window_holds(threads, ahead):
    alive, most, lock = 0, 0, threading.Lock()

    def items():
        nonlocal alive, most
        for item in range(40):
            with lock:
                alive += 1
                most = max(most, alive)
            yield item

    with ordered_map(items(), lambda item: item, threads=threads, ahead=ahead) as results:
        for _ in results:
            with lock:
                alive -= 1
    assert most <= threads + ahead


def test_the_first_error_in_the_order_of_items_is_raised():
    def work(item):
        if item == 7:
            raise ValueError("late in order, early in time")
        time.sleep(0.01)
        if item == 5:
            raise KeyError("first")
        return item

    found = []
    with pytest.raises(KeyError, match="first"), ordered_map(range(20), work, threads=4) as results:
        found += list(results)
    assert found == []


def test_no_worker_runs_after_the_reader_of_the_results_failed():
    """The error holds its traceback, and that the results: they must end with the block, not with the error."""
    running = threading.Semaphore(0)

    def work(item):
        running.release()
        time.sleep(0.02)
        return item

    with (
        no_thread_outlives(),
        pytest.raises(RuntimeError) as raised,
        ordered_map(range(1000), work, threads=3) as results,
    ):
        for _ in results:
            raise RuntimeError("the reader failed")
    started = running._value
    time.sleep(0.1)
    assert running._value == started <= 5
    assert raised.value is not None


def test_buffers_are_reused_within_a_thread_and_never_shared():
    buffers = Buffers()
    first = buffers.get("a", 100)
    assert buffers.get("a", 50) is first
    assert buffers.get("a", 100) is first
    assert buffers.get("b", 100) is not first
    assert buffers.get("a", 101).size >= 101
    others = []
    thread = threading.Thread(target=lambda: others.append(buffers.get("a", 10)))
    thread.start()
    thread.join()
    assert others[0] is not buffers.get("a", 10)
