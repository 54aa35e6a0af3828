"""Copies tensors to a GPU through two pinned buffers: while the copy from one is under way, the next is filled.

From memory that is not pinned, the driver copies small pieces, and the caller waits. A copy has the dtype of the
source, which is converted on the GPU: 16-bit weights are half the bytes.
"""

from collections.abc import Iterator
from typing import Any

from flexmerge_cli.later import Tensor, torch

PIECE_BYTES = 16 << 20
"""The most bytes of one buffer: pinned memory does not grow with the tensors."""


def pinned(num_bytes: int) -> Tensor:
    """Return memory, uint8, that a GPU reads by itself."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class Uploads:
    """The two buffers of one thread. They grow to the largest piece."""

    def __init__(self) -> None:
        self._buffers: list[Tensor | None] = [None, None]
        self._copied: list[Any] = [None, None]
        """Events after the last copy from each buffer."""
        self._turn = 0

    def __call__(self, values: Tensor, device: "torch.device") -> Tensor:
        """Return values of one or two axes on a device, in their dtype; on the CPU, where they are, themselves.

        The copy may still be under way, and what the device computes next waits for it. `values` may change at once.
        """
        if device.type == "cpu":
            return values
        cuda: Any = torch.cuda  # whose calls torch does not annotate
        found = torch.empty(values.shape, dtype=values.dtype, device=device)
        for piece, place in _pieces(values, found):
            turn, self._turn = self._turn, 1 - self._turn
            place.copy_(self._filled(turn, piece), non_blocking=True)
            self._copied[turn] = cuda.Event()
            self._copied[turn].record(cuda.current_stream(device))
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
    if values.numel() * values.element_size() <= PIECE_BYTES:
        yield values, place
        return
    sources, targets = (values, place) if values.dim() == 2 else (values[None], place[None])
    step = PIECE_BYTES // values.element_size()
    for source, target in zip(sources, targets):
        for low in range(0, len(source), step):
            yield source[low : low + step], target[low : low + step]
