"""Copies to a GPU through pinned buffers, on a stand-in for CUDA whose streams do everything as late as they may."""

import gc
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch

from flexmerge_cli.engine import upload
from flexmerge_cli.engine.pool import loading, ordered_map, with_fallback
from flexmerge_cli.engine.upload import MemoryFor, Uploads
from flexmerge_cli.errors import MachineError

copy, empty = torch.Tensor.copy_, torch.empty


class Late:
    """A GPU whose streams work only when somebody waits for them, and as far as he waits; copies then read what the
    pinned memory holds. Its tensors are 7 until they are copied to."""

    type = "cuda"

    def __init__(self, patch):
        self.waits, self.pinned, self.memory, self.readers, self.from_elsewhere = 0, [], set(), [], 0
        self.local, self.streams = threading.local(), []
        self.default = self.stream()
        patch.setattr(upload, "pinned", self.allocate)
        patch.setattr(upload.torch, "empty", lambda shape, *, dtype, device=None: torch.full(shape, 7, dtype=dtype))
        patch.setattr(torch.Tensor, "copy_", self.copy)
        patch.setattr(torch.Tensor, "record_stream", lambda held, stream: self.readers.append((id(held), stream)))
        patch.setattr(torch.cuda, "current_stream", lambda device: getattr(self.local, "stream", self.default))
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self.local, "stream", stream))
        patch.setattr(torch.cuda, "Stream", lambda device: self.stream())
        patch.setattr(torch.cuda, "stream", self.on)
        patch.setattr(torch.cuda, "Event", lambda: Event(self))

    def stream(self):
        self.streams.append(Stream())
        return self.streams[-1]

    @contextmanager
    def on(self, stream):
        before = torch.cuda.current_stream(self)
        self.local.stream = stream
        yield
        self.local.stream = before

    def allocate(self, num_bytes):
        self.pinned.append(num_bytes)
        made = torch.zeros(num_bytes, dtype=torch.uint8)
        self.memory.add(made.untyped_storage().data_ptr())
        return made

    @property
    def copy(self):
        def copied(into, values, non_blocking=False):
            if not non_blocking:
                return copy(into, values)
            self.from_elsewhere += values.untyped_storage().data_ptr() not in self.memory
            torch.cuda.current_stream(self).queue.append(lambda: copy(into, values))
            return into

        return copied

    def computed(self, values):
        """Queue a kernel that reads values, and return what it will have read."""
        read = []
        torch.cuda.current_stream(self).queue.append(lambda: read.append(values.clone()))
        return read

    def wait(self):
        torch.cuda.current_stream(self).synchronize()


class Stream:
    def __init__(self):
        self.queue, self.done = [], 0

    def run(self, upto):
        while self.done < upto:
            self.done += 1
            self.queue[self.done - 1]()

    def synchronize(self):
        self.run(len(self.queue))

    def wait_stream(self, other):
        upto = len(other.queue)
        self.queue.append(lambda: other.run(upto))


class Event:
    """A place in the queue of a stream."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record(self, stream):
        self.stream, self.place = stream, len(stream.queue)

    def synchronize(self):
        self.gpu.waits += 1
        self.stream.run(self.place)


@pytest.fixture
def late(monkeypatch):
    return Late(monkeypatch)


def matrices(count):
    made = torch.Generator().manual_seed(0)
    return [torch.randn(3, 8 + number, generator=made).bfloat16()[:, :8] for number in range(count)]


@pytest.mark.parametrize("most", [48, 8, 6])
def test_a_buffer_is_filled_again_only_when_its_copy_is_done(most, late, monkeypatch):
    """Rows of a matrix, in the dtype of the source, whole or in pieces, whatever becomes of them after the call."""
    monkeypatch.setattr(upload, "PIECE_BYTES", most)
    uploads, expected, found = Uploads(), matrices(5), []
    for values in matrices(5):
        found.append(uploads(values, late))
        values.zero_()
    # The first matrix is contiguous, and has one axis for copies.
    pieces = {48: 5, 8: 6 + 4 * 6, 6: 8 + 4 * 9}[most]
    assert late.waits == pieces - 2 and late.pinned == [most, most] and late.from_elsewhere == 0
    late.wait()
    assert all(one.dtype is torch.bfloat16 and torch.equal(one, other) for one, other in zip(found, expected))


def test_the_next_copy_does_not_wait_for_the_one_before(late):
    uploads = Uploads()
    first, second = (uploads(values, late) for values in matrices(2))
    assert late.waits == 0 and bool((first == 7).all()) and bool((second == 7).all())


def test_what_is_computed_next_waits_for_the_copy_and_the_copy_for_nothing_computed(late):
    uploads, before = Uploads(), late.computed(torch.ones(1))
    found = uploads(matrices(1)[0], late)
    read = late.computed(found)
    own = late.streams[1]
    own.synchronize()
    assert torch.equal(found, matrices(1)[0]) and not before and not read
    assert late.readers == [(id(found), late.default)]  # whose memory is free only when that stream is done with it
    second = uploads(matrices(2)[1], late)
    read = late.computed(second)
    late.wait()
    assert torch.equal(read[0], matrices(2)[1]) and len(late.streams) == 2


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 3, 4), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16, torch.float8_e4m3fn, torch.float64, torch.complex64])
def test_contiguous_values_have_any_shape_and_dtype(shape, dtype, late, monkeypatch):
    monkeypatch.setattr(upload, "PIECE_BYTES", 16)
    size = torch.Size(shape).numel() * dtype.itemsize
    values = torch.randint(0, 2, (size,), dtype=torch.uint8).view(dtype).reshape(shape)
    found = Uploads()(values, late)
    late.wait()
    assert found.shape == shape and found.dtype is dtype
    assert torch.equal(found.view(-1).view(torch.uint8), values.view(-1).view(torch.uint8))


def test_one_value_has_any_stride(late):
    found = Uploads()(torch.tensor([3.0]).as_strided((1,), (0,)), late)
    late.wait()
    assert found.tolist() == [3.0]


def test_buffers_grow_and_the_cpu_needs_none(late):
    uploads = Uploads()
    sizes = (10, 10, 1000, 5)
    found = [uploads(torch.arange(size), late) for size in sizes]
    late.wait()
    assert [one.tolist() for one in found] == [list(range(size)) for size in sizes]
    assert late.pinned == [80, 80, 8000]
    values = torch.arange(3)
    assert uploads(values, torch.device("cpu")) is values


def test_each_thread_of_the_engine_has_streams_and_buffers_of_its_own(late):
    uploads, both = Uploads(), threading.Barrier(2)

    def work(number):
        found = uploads(torch.full((4,), number), late)
        read = late.computed(found)
        both.wait(30)
        late.wait()
        return torch.cuda.current_stream(late), read[0].tolist()

    with ordered_map(range(2), work, threads=2, device=late) as results:
        (first, zeros), (second, ones) = results
    assert (zeros, ones) == ([0] * 4, [1] * 4)
    assert len({first, second, late.default}) == 3 and len(late.streams) == 5 and len(late.pinned) == 2


def test_what_threads_load_is_there_at_the_end_for_every_stream(late):
    """They compute on the stream of the caller, whose memory it is."""
    uploads, caller, seen = Uploads(), late.stream(), set()

    def read(number):
        seen.add(torch.cuda.current_stream(late))
        return uploads(torch.full((4,), number), late)

    with late.on(caller), loading(late) as pool:
        found = list(pool.map(read, range(8)))
    assert seen == {caller} and [one.tolist() for one in found] == [[number] * 4 for number in range(8)]
    assert {stream for _, stream in late.readers} == {caller}


def test_buffers_of_inference_mode_are_filled_outside_of_it(monkeypatch):
    monkeypatch.setattr(upload.torch, "empty", lambda *a, pin_memory, **of: empty(*a, **of))
    with torch.inference_mode():
        made = upload.pinned(8)
    made.copy_(torch.ones(8, dtype=torch.uint8))
    assert made.tolist() == [1] * 8


def test_memory_that_cannot_be_pinned_is_said(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(upload.torch, "empty", fails)
    with pytest.raises(MachineError, match=r"8 bytes of memory cannot be pinned .*: CUDA error: out of memory$"):
        upload.pinned(8)


class Held:
    """Stands for a tensor."""


def fails_holding(seen):
    held = Held()
    seen.append(weakref.ref(held))
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("nested", [False, True])
def test_an_error_of_memory_says_what_to_do_and_holds_no_tensor(nested):
    seen = []
    with pytest.raises(MachineError) as caught, MemoryFor("task `a`", "cuda:1", hint="drop some"):
        if nested:
            with MemoryFor("`x`", "cuda:1", hint="drop some"):
                fails_holding(seen)
        fails_holding(seen)
    gc.collect()
    assert str(caught.value).startswith(f"cuda:1 has no memory left for {'`x`' if nested else 'task `a`'}")
    assert caught.value.hint == "drop some" and seen[0]() is None


def test_what_failed_on_the_gpu_is_freed_before_it_runs_on_the_cpu():
    seen, told = [], []
    assert with_fallback(lambda: fails_holding(seen), lambda: seen[0]() is None, told.append)
    assert len(told) == 1
