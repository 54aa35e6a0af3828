"""A weight that stays in its stored bytes: a tensor that decodes the tiles a product needs, and forgets them.

On a GPU torch decodes them; products of few rows with codes alone are one kernel, where Triton is there (fused.py).

Linear layers, transformers' Conv1D, convolutions and embeddings find what they call below; every other operation gets
the decoded weight, for as long as it lasts. `torch.compile` breaks its graph at these products, and compiles what lies
between.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from flexmerge_cli import native
from flexmerge_cli.bundle.packed_on import JoinedRowsOn, PackedOn
from flexmerge_cli.checkpoint.dtypes import NUMPY
from flexmerge_cli.engine.device import as_tensor
from flexmerge_cli.stored.packed import Elements, JoinedRows, Packed

# Elements of a tile, 16 MB in float32: most matrices are one, since BLAS has slower kernels for narrow ones.
TILE_ELEMENTS = 1 << 22

# Elements that are worth a thread.
THREAD_ELEMENTS = 1 << 15

# Up to so many rows of x, multiplying by codes beats decoding a tile and multiplying by that.
FEW_ROWS = 8
# The same of the fused kernel, which reads the weight once for 16 rows.
FEW_ROWS_FUSED = 16

_aten = torch.ops.aten


class PackedWeight(Tensor):
    """A weight [m, …] of the dtype that the model computes in."""

    packed: Packed | JoinedRows | PackedOn | JoinedRowsOn
    form: tuple[torch.dtype, torch.device]
    """Its dtype and device, which cost a microsecond each where torch is asked."""
    _halves: "tuple[PackedWeight, Packed | None] | None" = None

    @staticmethod
    def __new__(
        cls, packed: Packed | JoinedRows | PackedOn | JoinedRowsOn, shape: tuple[int, ...], dtype: torch.dtype
    ) -> "PackedWeight":
        """Make a weight. packed: its rows are the first axis of `shape`."""
        device = packed.device if isinstance(packed, (PackedOn, JoinedRowsOn)) else torch.device("cpu")
        made: PackedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.packed, made.form = packed, (dtype, device)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = _PRODUCTS.get(func)
        if product is not None:
            found = product(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        elif func in _OF_THE_WRAPPER or (func.__name__ in ("__get__", "__set__") and func not in _OF_ELEMENTS):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = _decoded((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (_aten.detach.default, _aten.alias.default):
            with torch.inference_mode(
                False
            ):  # torch makes it a view of the weight, which an inference tensor cannot be
                return cls(args[0].packed, tuple(args[0].shape), args[0].dtype)
        args, kwargs = _decoded((args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeight":
        """Return a weight of the same bytes, which nothing writes to."""
        return PackedWeight(self.packed, tuple(self.shape), self.dtype)

    def halves(self) -> "tuple[PackedWeight, Packed | None]":
        """Return the centre, which tasks share, as a weight in float32, and the rest of the sum."""
        if self._halves is None:
            packed = self.packed
            assert isinstance(packed, Packed)
            centre = Packed(matrix=packed.matrix, dtype="F32", dense=packed.dense, codes=packed.codes[:1])
            rest = replace(packed, dtype="F32", dense=None, codes=packed.codes[1:])
            if packed.dense is not None:
                centre, rest = replace(centre, codes=()), replace(rest, codes=packed.codes)
            has_rest = bool(rest.codes) or rest.factors is not None or rest.kept is not None
            self._halves = PackedWeight(centre, tuple(self.shape), torch.float32), rest if has_rest else None
        return self._halves

    def decoded(self) -> Tensor:
        """Decode the whole weight, into memory of its own."""
        return self.piece(0, self.packed.matrix[0]).reshape(self.shape)

    def piece(self, first: int, stop: int) -> Tensor:
        """Decode rows [first, stop), [stop - first, n]."""
        if isinstance(self.packed, (PackedOn, JoinedRowsOn)):
            return self.packed.decode(slice(first, stop)).to(self.dtype)
        found: Tensor = self.gathered(torch.arange(first, stop))
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it can look neither into numpy nor into C
    def gathered(self, places: Tensor) -> Tensor:
        """Decode rows, [k, n], by as many threads as torch uses. places: int64 [k] on the weight's device."""
        packed = self.packed
        if isinstance(packed, (PackedOn, JoinedRowsOn)):
            return packed.decode(places).to(self.dtype)
        rows, n = places.numpy(), packed.matrix[1]
        whole = np.empty((len(rows), n), NUMPY[packed.dtype])

        def part(first: int, count: int) -> None:
            packed.decode_into(rows[first : first + count], whole[first : first + count])

        _by_threads(part, len(rows), whole.size)
        return as_tensor(whole.reshape(-1).view(np.uint8), packed.dtype).reshape(len(rows), n).to(self.dtype)

    def tiles(self) -> "list[tuple[int, int]]":
        m, n = self.packed.matrix
        step = max(1, TILE_ELEMENTS // max(1, n))
        return [(first, min(m, first + step)) for first in range(0, m, step)]


def _decoded(arguments: Any) -> Any:
    return tree_map_only(PackedWeight, lambda held: held.decoded(), arguments)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Return x · Wᵀ + bias."""
    if not isinstance(weight, PackedWeight) or not _is_plain(x, weight) or isinstance(bias, PackedWeight):
        return NotImplemented
    rows, m = x.reshape(-1, x.shape[-1]), weight.packed.matrix[0]
    if len(rows) <= FEW_ROWS and weight.packed.has_product:
        assert isinstance(weight.packed, Packed)
        found = split_product(rows, weight.packed)
        found = (found if bias is None else found + bias).to(x.dtype)
    elif len(rows) <= FEW_ROWS_FUSED and _has_kernel(weight):
        from flexmerge_cli.serving import fused

        assert isinstance(weight.packed, PackedOn)
        found = fused.product(rows, weight.packed)
        found = (found if bias is None else found + bias).to(x.dtype)
    else:
        found = rows.new_empty(len(rows), m)
        for first, stop in weight.tiles():
            tile, out = weight.piece(first, stop).T, found[:, first:stop]
            if bias is None:
                torch.mm(rows, tile, out=out)
            else:
                torch.addmm(bias[first:stop], rows, tile, out=out)
    return found.reshape(*x.shape[:-1], m)


def _has_kernel(weight: PackedWeight) -> bool:
    """Return whether the fused kernel can take products with the weight: on CUDA, codes alone."""
    if not weight.is_cuda or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not has_triton():
        return False
    return isinstance(weight.packed, PackedOn) and weight.packed.is_codes_alone


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def split_product(x: Tensor, packed: Packed) -> Tensor:
    """Return x · Wᵀ in float32, [k, m], without decoding the weight."""
    m, n = packed.matrix
    x = x.to(torch.float32).contiguous()
    if packed.loops is not None and native.decoding is not None:
        found = _product(x, packed.loops, m)
    elif packed.dense is not None:
        found = functional.linear(x, _tensor(packed.dense, m, n).to(torch.float32))
    else:
        found = x.new_zeros(len(x), m)
    if packed.factors is not None:
        left, right = packed.factors
        rank = len(right.bits) // n
        inner = functional.linear(x, _tensor(right, rank, n).to(torch.float32))
        found += functional.linear(inner, _tensor(left, m, rank).to(torch.float32))
    if packed.kept is not None:
        kept = packed.kept
        values = _tensor(kept.values, 1, len(kept.columns)).to(torch.float32)
        of_row = torch.repeat_interleave(torch.arange(m), torch.from_numpy(np.diff(kept.starts)))
        found.index_add_(1, of_row, x[:, torch.from_numpy(kept.columns.astype(np.int64))] * values)
    return found


def _product(x: Tensor, rows: native.Rows, m: int) -> Tensor:
    """Multiply by dense elements and codes, in C and by as many threads as torch uses; float32 [k, n] -> [k, m]."""
    assert native.decoding is not None
    (k, n), product, held = x.shape, native.decoding.flexmerge_product, native.address(rows)
    found = x.new_empty(k, m)
    source, out = x.data_ptr(), found.data_ptr()
    _by_threads(lambda first, count: product(held, first, count, source, k, out + 4 * first, m), m, m * n)
    return found


def _add_product_of_rows(x: Tensor, packed: Packed, out: Tensor) -> None:
    """Add x · W to out, float32 [k, m] and [k, n], contiguous. The weight has neither factors nor kept elements."""
    assert native.decoding is not None and packed.loops is not None
    (m, n), product, held = packed.matrix, native.decoding.flexmerge_product_of_rows, native.address(packed.loops)
    source, k, into = x.data_ptr(), len(x), out.data_ptr()
    # Whole bytes of codes: eight columns.
    _by_threads(
        lambda first, count: product(held, m, 8 * first, min(8 * count, n - 8 * first), source, k, into),
        -(-n // 8), m * n,
    )  # fmt: skip


def _by_threads(run: Callable[[int, int], object], count: int, elements: int) -> None:
    """Call run(first, number) for parts of `count` things, side by side if there are enough elements of a weight."""
    threads = min(torch.get_num_threads(), elements // THREAD_ELEMENTS, count)
    if threads <= 1:
        run(0, count)
    else:
        cuts = [count * part // threads for part in range(threads + 1)]
        list(_pool().map(lambda first, stop: run(first, stop - first), cuts[:-1], cuts[1:]))


def _addmm(added: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """Return bias + x · W, as transformers' Conv1D calls it."""
    if not isinstance(weight, PackedWeight) or not _is_plain(x, weight) or (beta, alpha) != (1, 1):
        return NotImplemented
    packed = weight.packed
    found = added.expand(len(x), weight.shape[1]).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if len(x) <= FEW_ROWS and isinstance(packed, Packed) and packed.is_in_loops:
        _add_product_of_rows(x.to(torch.float32).contiguous(), packed, found)
        return found.to(x.dtype)
    for first, stop in weight.tiles():
        tile = weight.piece(first, stop)
        if x.dtype is torch.float32:
            found.addmm_(x[:, first:stop], tile)
        else:
            found += x[:, first:stop] @ tile
    return found.to(x.dtype)


def _convolution(convolve: Callable[..., Tensor]) -> Callable[..., Any]:
    def product(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1,
    ) -> Any:  # fmt: skip
        if not isinstance(weight, PackedWeight) or groups != 1 or not _is_plain(x, weight):
            return NotImplemented
        return torch.cat(
            [
                convolve(
                    x, weight.piece(first, stop).reshape(-1, *weight.shape[1:]),
                    None if bias is None else bias[first:stop], stride, padding, dilation,
                )
                for first, stop in weight.tiles()
            ],
            dim=x.dim() - weight.dim() + 1,
        )  # fmt: skip

    return product


def _embedding(
    ids: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, *_: Any, **__: Any
) -> Any:
    """Decode the rows that are asked for, each once."""
    if not isinstance(weight, PackedWeight) or max_norm is not None:
        return NotImplemented
    rows, places = torch.unique(ids, return_inverse=True)
    if rows.numel() and not (int(rows[0]) >= 0 and int(rows[-1]) < len(weight)):
        raise IndexError(f"an index of an embedding is outside of its {len(weight)} rows")
    return weight.gathered(rows)[places]


def _item(weight: Tensor, index: Any) -> Any:
    if not isinstance(weight, PackedWeight) or not isinstance(index, (slice, Tensor)) or weight.dim() != 2:
        return NotImplemented
    rows = torch.arange(len(weight), device=weight.device)[index]
    return weight.gathered(rows.reshape(-1)).reshape(*rows.shape, weight.shape[1])


_PRODUCTS: dict[Any, Callable[..., Any]] = {
    function: torch.compiler.disable(product)  # type: ignore[no-untyped-call]
    for function, product in {
        functional.linear: _linear,
        torch.addmm: _addmm,
        functional.conv1d: _convolution(functional.conv1d),
        functional.conv2d: _convolution(functional.conv2d),
        functional.embedding: _embedding,
        Tensor.__getitem__: _item,
    }.items()
}


_OF_THE_WRAPPER = {
    Tensor.detach, Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__,
    Tensor.stride, Tensor.is_contiguous, Tensor.storage_offset, Tensor.element_size, Tensor.data_ptr, Tensor.get_device,
    Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex, Tensor.is_inference,
    Tensor.requires_grad_, Tensor.__hash__, Tensor.untyped_storage, Tensor.is_pinned, Tensor.is_shared,
}  # fmt: skip
"""What a weight answers without being decoded, besides its attributes."""

_OF_ELEMENTS = {vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}
"""The attributes that are tensors of elements."""


def _is_plain(x: Tensor, weight: PackedWeight) -> bool:
    """Return whether our products apply. What needs a gradient, or would raise, goes to torch."""
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    return type(x) is not PackedWeight and (x.dtype, x.device) == weight.form and not needs_gradient


def _tensor(part: Elements, m: int, n: int) -> Tensor:
    """Return a tensor of the same memory."""
    return as_tensor(part.bits.view(np.uint8), part.dtype).reshape(m, n)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode")
