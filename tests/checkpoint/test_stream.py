"""Streamed files: how they are cut into requests, that each byte comes once, and that no more is held than was said."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.remote import RangeFile, coalesce
from flexmerge_cli.checkpoint.stream import MIN_REQUEST_BYTES, StreamedFile, StreamPool, cut
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import SourceError


class Source:
    """A file in memory that notes every request."""

    def __init__(self, data: bytes, failures: int = 0) -> None:
        self.data, self.size, self.path, self.name = data, len(data), Path("x"), "x"
        self.asked: list[tuple[int, int]] = []
        self.failures, self.lock = failures, threading.Lock()

    def read_range(self, start: int, stop: int) -> bytes:
        with self.lock:
            self.asked.append((start, stop))
            if self.failures:
                self.failures -= 1
                raise SourceError("broken", hint="again")
        return self.data[start:stop]


SIZES = st.lists(st.sampled_from([0, 1, 2, 7, 50, 99, 100, 101, 350]), max_size=30)


@given(SIZES, st.sampled_from([1, 10, 100]), st.integers(0, 20))
def test_pieces_hold_every_tensor_and_are_no_larger_than_a_request(sizes, request_bytes, first):
    starts = [first + sum(sizes[:place]) for place in range(len(sizes))]
    extents = [(start, start + size) for start, size in zip(starts, sizes)]
    bounds = cut(extents, request_bytes)
    assert bounds == sorted(set(bounds)) or bounds == [0, 0]
    assert all(high - low <= request_bytes for low, high in pairwise(bounds))
    if sum(sizes):
        assert (bounds[0], bounds[-1]) == (first, first + sum(sizes))
    for start, stop in extents:
        inside = [bound for bound in bounds if start < bound < stop]
        if 0 < stop - start <= request_bytes:
            assert inside == [], "a small tensor is one request"
        if stop - start > request_bytes:
            assert start in bounds and stop in bounds, "a large one shares none"


def test_neighbours_are_one_request():
    assert cut([(0, 10), (10, 20), (20, 30), (30, 300), (300, 310), (310, 320)], 100) == [0, 30, 120, 210, 300, 320]


def test_shared_storage_is_one_extent():
    assert cut([(0, 50), (0, 50), (10, 20), (50, 60)], 100) == [0, 60]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_read_gives_the_bytes_of_the_file(data):
    sizes = data.draw(st.lists(st.integers(0, 3 * MIN_REQUEST_BYTES // 2), min_size=1, max_size=6))
    content = np.random.default_rng(0).integers(0, 256, sum(sizes), np.uint8).tobytes()
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    source, pool = Source(content), StreamPool(max_bytes=4 * MIN_REQUEST_BYTES)
    file = StreamedFile(source, [(start, start + size) for start, size in zip(starts, sizes)])
    pool.add([file])
    for start, size in data.draw(st.permutations(list(zip(starts, sizes)))):
        tensor = StoredTensor(name="a", dtype="U8", shape=(size,), path=source.path, offset=start, stream=file)
        low = data.draw(st.integers(0, size))
        high = data.draw(st.integers(low, size))
        with Reader() as reader:
            reader.will_need(tensor, low, high)
            got = reader.read(tensor, low, high, np.zeros(size + 3, np.uint8))
        assert got.tobytes() == content[start + low : start + high]


def test_front_to_back_each_byte_comes_once_and_memory_is_bounded():
    models, size = 3, 40 * MIN_REQUEST_BYTES
    pool = StreamPool(max_bytes=12 * MIN_REQUEST_BYTES)
    sources = [Source(bytes([number]) * size) for number in range(models)]
    files = [StreamedFile(source, [(0, size)]) for source in sources]
    for file in files:
        pool.add([file])
    step = MIN_REQUEST_BYTES // 3
    for low in range(0, size, step):
        for number, file in enumerate(files):
            buffer = bytearray(min(step, size - low))
            file.read_into(low, low + len(buffer), memoryview(buffer))
            assert set(buffer) == {number}
            file.will_need(min(low + 2 * step, size), min(low + 3 * step, size))
    assert [len(source.asked) for source in sources] == [40] * models
    assert all(sum(high - low for low, high in source.asked) == size for source in sources)
    assert pool.most_bytes <= pool.max_bytes


def test_with_more_readers_than_room_they_take_turns():
    """Each took a piece whether there was room or not: 16 requests in transit, whatever --max-memory was."""
    size, readers = 12 * MIN_REQUEST_BYTES, 8
    pool = StreamPool(max_bytes=2 * MIN_REQUEST_BYTES)
    files = [StreamedFile(Source(bytes([number]) * size), [(0, size)]) for number in range(readers)]
    for file in files:
        pool.add([file])

    def read(number: int) -> bool:
        buffer = bytearray(size)
        files[number].read_into(0, size, memoryview(buffer))
        return set(buffer) == {number}

    with ThreadPoolExecutor(readers) as threads:
        assert all(threads.map(read, range(readers)))
    assert 0 < pool.most_bytes <= pool.max_bytes


def test_a_piece_that_did_not_come_is_told_and_asked_for_again():
    source, pool = Source(b"abc", failures=1), StreamPool()
    file = StreamedFile(source, [(0, 3)])
    pool.add([file])
    buffer = bytearray(3)
    with pytest.raises(SourceError, match="broken"):
        file.read_into(0, 3, memoryview(buffer))
    file.read_into(0, 3, memoryview(buffer))
    assert bytes(buffer) == b"abc"


def test_more_models_have_smaller_requests_in_the_same_memory():
    few, many = StreamPool(max_bytes=256 << 20), StreamPool(max_bytes=256 << 20)
    for _ in range(2):
        few.add([])
    for _ in range(31):
        many.add([])
    assert few.request_bytes == 8 << 20
    assert many.request_bytes == (256 << 20) // (4 * 31)


# Remote files that are read and sought in.


def test_a_range_file_asks_for_what_is_read_and_nothing_twice():
    source = Source(bytes(range(200)))
    file = RangeFile(source)
    assert (file.read(8), file.tell()) == (bytes(range(8)), 8)
    file.seek(-5, 2)
    assert (file.read(), file.read(3)) == (bytes(range(195, 200)), b"")
    file.seek(2)
    assert file.read(3) == bytes([2, 3, 4])
    assert [pair for pair in source.asked if pair[0] < pair[1]] == [(0, 8), (195, 200)]
    with pytest.raises(ValueError, match="before the start"):
        file.seek(-1)


def test_prefetched_ranges_are_few_requests():
    source = Source(bytes(10_000))
    file = RangeFile(source)
    file.prefetch([(0, 30), (100, 130), (9_000, 9_030), (9_990, 10_020)])
    assert sorted(source.asked) == [(0, 130), (9_000, 9_030), (9_990, 10_000)]
    file.seek(9_000)
    file.read(30)
    assert len(source.asked) == 3


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100))), st.integers(0, 9))
def test_coalesced_ranges_cover_what_was_asked_and_are_apart(ranges, gap):
    found = coalesce(ranges, gap)
    for start, stop in ranges:
        assert start >= stop or any(low <= start and stop <= high for low, high in found)
    assert all(right[0] > left[1] + gap for left, right in pairwise(found))
