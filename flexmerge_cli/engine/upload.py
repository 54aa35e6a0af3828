"""Brings weights to a GPU: for plans and merges, views, and models in memory.

A thread copies through two pinned buffers: while the copy from one is under way, the next is filled. From memory that
is not pinned, the driver copies small pieces, and the caller waits. A copy has the dtype of the source, which is
converted on the GPU: 16-bit weights are half the bytes. Copies run on a stream of the thread's own, beside what it
computes.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from flexmerge_cli.errors import MachineError
from flexmerge_cli.later import Tensor, torch

PIECE_BYTES = 16 << 20
"""The most bytes of one buffer: pinned memory does not grow with the tensors."""


def pinned(num_bytes: int) -> Tensor:
    """Return memory, uint8, that a GPU reads by itself. Raises MachineError if the system pins no more."""
    try:
        with torch.inference_mode(False):  # a tensor of inference mode could not be filled outside of it
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise MachineError(
            f"{num_bytes:,} bytes of memory cannot be pinned for copies to the GPU: {str(error).partition(chr(10))[0]}",
            hint="free memory of this machine, use fewer --threads, or --device cpu",
        ) from None


class Uploads(threading.local):
    """What each thread copies with: two buffers, which grow to the largest piece, and a stream for each device."""

    def __init__(self) -> None:
        self._buffers: list[Tensor | None] = [None, None]
        self._copied: list[Any] = [None, None]
        """Events after the last copy from each buffer."""
        self._turn = 0
        self._streams: dict[torch.device, Any] = {}

    def __call__(self, values: Tensor, device: "torch.device") -> Tensor:
        """Return values on a device, in their dtype; on the CPU, where they are, themselves.

        values: contiguous, or of one or two axes. They may change as soon as this returns. The copy may still be under
        way: what the thread's current stream computes next waits for it.
        """
        if device.type == "cpu":
            return values
        cuda: Any = torch.cuda  # whose calls torch does not annotate
        computing = cuda.current_stream(device)
        if device not in self._streams:
            self._streams[device] = cuda.Stream(device)
        copying = self._streams[device]
        with cuda.stream(copying):  # Memory of this stream needs no wait for what others have queued.
            found = torch.empty(values.shape, dtype=values.dtype, device=device)
            for piece, place in _pieces(values, found):
                turn, self._turn = self._turn, 1 - self._turn
                place.copy_(self._filled(turn, piece), non_blocking=True)
                self._copied[turn] = cuda.Event()
                self._copied[turn].record(copying)
        computing.wait_stream(copying)
        found.record_stream(computing)  # Its memory is used again only when what reads it there is done.
        return found

    def _filled(self, turn: int, piece: Tensor) -> Tensor:
        """Fill a buffer, once the last copy from it is done."""
        if self._copied[turn] is not None:
            self._copied[turn].synchronize()
        num_bytes, buffer = piece.numel() * piece.element_size(), self._buffers[turn]
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._buffers[turn] = pinned(num_bytes)
        return buffer[:num_bytes].view(piece.dtype).view(piece.shape).copy_(piece)


def _pieces(values: Tensor, place: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield parts of the values that a buffer holds, with their places."""
    if values.is_contiguous():
        values, place = values.view(-1), place.view(-1)
    if values.numel() * values.element_size() <= PIECE_BYTES:
        yield values, place
        return
    sources, targets = (values, place) if values.dim() == 2 else (values[None], place[None])
    step = PIECE_BYTES // values.element_size()
    for source, target in zip(sources, targets):
        for low in range(0, len(source), step):
            yield source[low : low + step], target[low : low + step]


def adopting(device: "torch.device", *, own: bool) -> Callable[[], None]:
    """Return what a new thread calls first, so that it computes on the stream of the caller, or on one of its own.

    A new thread would otherwise use the default stream of the first GPU, whatever the caller has chosen. With streams
    of their own, copies of one thread run beside the arithmetic of another; what one has made, others may then use only
    once it has waited for it, as it does for whatever it moves to the CPU.
    """
    if device.type == "cpu":
        return lambda: None
    cuda: Any = torch.cuda
    if own:
        return lambda: cuda.set_stream(cuda.Stream(device))
    return partial(cuda.set_stream, cuda.current_stream(device))


@contextmanager
def arrived(device: "torch.device") -> Iterator[None]:
    """At the end of the block, wait until whatever the current stream was given is done: any stream may then use it."""
    yield
    if device.type != "cpu":
        cuda: Any = torch.cuda
        cuda.current_stream(device).synchronize()


class MemoryFor:
    """Raises MachineError where the device has no memory left for what the block places on it.

    The error keeps no frames of the block, which hold tensors for as long as somebody holds the error.
    """

    def __init__(self, what: str, device: "torch.device", *, hint: str) -> None:
        self._what, self._device, self._hint = what, device, hint

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, traceback: object) -> None:
        is_out = isinstance(error, torch.OutOfMemoryError)
        if error is not None and (is_out or isinstance(error, MachineError)):
            error.__traceback__ = None
        del error, traceback
        if is_out:
            raise MachineError(f"{self._device} has no memory left for {self._what}", hint=self._hint) from None
