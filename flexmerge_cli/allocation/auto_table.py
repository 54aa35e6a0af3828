"""Tabulates every way in which `auto` may store one tensor, with its bytes and predicted cost. Numpy only; sees no
weights.

A tensor's choice is a centre and, for each class of bit-identical tasks, an option. The cost is the predicted damage
Σ w · P over the tasks: P is the squared error of a coded copy, and the energy of a residual times the price of the part
that its code loses. Of the many combinations, only the Lagrangian optima of each centre are listed: its *curve*.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.allocation.auto_centres import (
    CODED,
    COPY,
    FREE,
    AutoCentre,
    CentreBits,
    centre_bytes,
    centres_of,
    factors,
)
from flexmerge_cli.allocation.auto_hull import frontier, hull, slopes
from flexmerge_cli.allocation.auto_statistics import LEAST_ERROR, Groups, TensorStatistics, Weight
from flexmerge_cli.request.auto_options import Limits
from flexmerge_cli.residuals.coder import MatrixView
from flexmerge_cli.stored.form import Bits

# K classes, C centres, V vertices and S segments of a class's hull, P positions on a curve,
# N points that may be on the frontier

Options = tuple[tuple[Bits, ...], np.ndarray, np.ndarray]
"""The hull of what one class may store: labels, bytes, and cost in units of the class's factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChoice:
    """How one tensor is stored."""

    tensor: str
    centre: AutoCentre
    bits: tuple[Bits, ...]
    """The bits of each task; the tasks of a class share one stored value."""
    num_bytes: int
    cost: float
    """The predicted damage Σ w · P."""
    errors: tuple[float, ...]
    """The predicted squared error of each task."""


class AutoTable:
    """All curves of one tensor, the frontier of their points, and its hull."""

    def __init__(
        self, tensor: TensorStatistics, levels: Mapping[int, Groups], weight: Weight, limits: Limits = Limits()
    ) -> None:
        """Make the table. levels: those of the tensor's block, as `partitions` gives them; weight: the tensor's w by
        task, [M]."""
        self.tensor = tensor
        self._classes = tensor.classes
        self.weight_M = np.broadcast_to(weight, len(tensor.same))
        self._weight_K = np.full(len(self._classes), weight if isinstance(weight, float) else 0.0)
        if isinstance(weight, np.ndarray):
            self._weight_K[:] = [weight[tasks].mean() for tasks in self._classes]
        if tensor.is_unchanged:  # exact copies, or the dense base where that serves tasks of several dtypes
            self.centres = [AutoCentre(kind="none"), AutoCentre(kind="base")]
        else:
            self.centres = [c for c in centres_of(tensor, levels) if c.kind in limits.centres] or [
                AutoCentre(kind="none")
            ]
        self._set_options(limits)
        self._set_curves()
        self.choice = functools.cache(self._choice)
        """Returns how the tensor is stored at a point of the frontier."""

    def _choice(self, point: int) -> TensorChoice:
        centre, position = divmod(int(self.points[point]), self._num_positions)
        applied = self._order_CP[centre, :position]
        taken_K = np.bincount(applied[applied >= 0], minlength=len(self._classes))
        bits: dict[int, Bits] = {}
        errors: dict[int, float] = {}
        for number, (tasks, taken) in enumerate(zip(self._classes, taken_K)):
            kind = self._kind_CK[centre, number]
            label = self._labels[kind][number][taken]
            unit = self._unit_cost_CKV[centre, number, taken]
            if kind == CODED:
                unit = self._decoded_losses.get(label, unit)
            error = float(unit * self._factor_CK[centre, number]) / len(tasks)
            bits |= dict.fromkeys(tasks, label)
            errors |= dict.fromkeys(tasks, error)
        order = range(len(bits))
        return TensorChoice(
            tensor=self.tensor.name,
            centre=self.centres[centre],
            bits=tuple(bits[task] for task in order),
            num_bytes=int(self.num_bytes[point]),
            cost=float(self.cost[point]),
            errors=tuple(errors[task] for task in order),
        )

    def uniform(self, centre_bits: CentreBits, bits: int) -> tuple[int, float]:
        """Return bytes and cost if all tasks share one average and have these bits; exact copies where those are
        smaller.

        An unchanged tensor is stored as `auto` stores it: its weight is 0, so that a loss would not show.
        """
        tensor = self.tensor
        if tensor.is_unchanged:
            return int(self.num_bytes[0]), 0.0
        if MatrixView.SQUEEZED.is_vector(tensor.shape):
            centre_bits = bits = 8
        centre = AutoCentre(kind="average", bits=centre_bits, groups=(tuple(range(len(tensor.same))),))
        dense = [tensor.dense_bytes(dtype) for dtype in tensor.dtypes]
        shared = int(centre_bytes(tensor, [centre])[0])
        if sum(dense) <= shared + len(dense) * tensor.code_bytes[bits] or len(self._classes) == 1:
            return sum(dense[tasks[0]] for tasks in self._classes), 0.0
        _, factor_CK = factors(tensor, [centre])
        cost = tensor.price(tensor.errors.ratio[bits]) * float((self._weight_K * factor_CK).sum())
        return shared + len(self._classes) * tensor.code_bytes[bits], cost

    def _set_options(self, limits: Limits) -> None:
        """Set the hull of every centre and class as unit costs times a factor, so that each hull is computed once."""
        tensor, firsts = self.tensor, [tasks[0] for tasks in self._classes]
        stored_K = [bool(tensor.copy_is_stored) and tensor.copy_is_stored[task] for task in firsts]
        copy: dict[float, float] = {
            bits: max(error, tensor.least_error) for bits, error in tensor.errors.average.items()
        }
        losses = tensor.residual_losses
        self._decoded_losses: dict[Bits, float] = {0: 1.0, **{bits: tensor.decoded_loss(bits) for bits in losses}}
        losses |= {0: 1.0} if tensor.may_drop else {}
        coded = {bits: tensor.price(max(loss, LEAST_ERROR)) for bits, loss in losses.items()}
        if tensor.is_unchanged:
            copy, coded = {}, {}
        free: Options = ((0,), np.zeros(1, np.int64), np.zeros(1))
        exact_bytes = [
            0 if stored else tensor.dense_bytes(tensor.dtypes[task]) for task, stored in zip(firsts, stored_K)
        ]
        of_bytes = {
            num_bytes: [
                _options(num_bytes, copy, tensor.code_bytes, limits),
                _options(num_bytes, coded, tensor.residual_bytes(limits.scales), limits),
                free,
            ]
            for num_bytes in dict.fromkeys(exact_bytes)
        }
        kinds = (COPY, CODED, FREE)
        self._labels = [[of_bytes[num_bytes][kind][0] for num_bytes in exact_bytes] for kind in kinds]
        num_vertices = max(len(labels) for of_kind in of_bytes.values() for labels, _, _ in of_kind)
        shape = (len(kinds), len(firsts), num_vertices)
        bytes_3KV, cost_3KV = np.zeros(shape, np.int64), np.zeros(shape)
        slope_3KS = np.full((*shape[:2], num_vertices - 1), -np.inf)
        for num_bytes, of_kind in of_bytes.items():
            is_one_K = np.array(exact_bytes) == num_bytes
            for kind, (labels, option_bytes, cost) in enumerate(of_kind):
                bytes_3KV[kind, is_one_K, : len(labels)] = option_bytes
                cost_3KV[kind, is_one_K, : len(labels)] = cost
                slope_3KS[kind, is_one_K, : len(labels) - 1] = slopes(option_bytes, cost)
        self._kind_CK, self._factor_CK = factors(tensor, self.centres)
        each = self._kind_CK, np.arange(len(firsts))
        self._bytes_CKV, self._unit_cost_CKV = bytes_3KV[each], cost_3KV[each]
        # A factor of 0 leaves nothing to gain. Slopes stay in falling order: all are multiplied by the same number.
        price_CK1 = (self._weight_K * self._factor_CK)[:, :, None]
        self._slope_CKS = np.where(price_CK1 > 0, slope_3KS[each] * np.where(price_CK1 > 0, price_CK1, 1.0), -np.inf)

    def _set_curves(self) -> None:
        """Compute every state on the curve of each centre, then keep those on the frontier."""
        num_centres, num_classes, num_segments = self._slope_CKS.shape
        slope_CP = self._slope_CKS.reshape(num_centres, -1)
        order_CP = np.argsort(-slope_CP, axis=1, kind="stable")  # ties: class, then position
        is_segment_CP = np.take_along_axis(slope_CP, order_CP, axis=1) > -np.inf
        self._order_CP = np.where(is_segment_CP, order_CP // max(1, num_segments), -1).astype(np.int32)
        self._num_positions = self._order_CP.shape[1] + 1
        shape = (num_centres, self._num_positions)

        added_CP = np.take_along_axis(np.diff(self._bytes_CKV).reshape(num_centres, -1), order_CP, axis=1)
        num_bytes = np.zeros(shape, np.int64)
        np.cumsum(np.where(is_segment_CP, added_CP, 0), axis=1, out=num_bytes[:, 1:])
        num_bytes += (centre_bytes(self.tensor, self.centres) + self._bytes_CKV[:, :, 0].sum(axis=1))[:, None]

        cost_CKV = self._unit_cost_CKV * (self._weight_K * self._factor_CK)[:, :, None]
        near = self._near_frontier(num_bytes, cost_CKV, order_CP, is_segment_CP)
        # Costs are summed anew for every state, in class order: subtracting step by step would not end at 0.
        centre_N, position_N = np.divmod(near, self._num_positions)
        place_CP = np.empty(slope_CP.shape, np.intp)  # the position of each segment, past the end if it is none
        end = slope_CP.shape[1]
        np.put_along_axis(place_CP, order_CP, np.where(is_segment_CP, np.arange(end), end), axis=1)
        place_CKS = place_CP.reshape(self._slope_CKS.shape)
        cost_N = np.zeros(len(near))
        for number in range(num_classes):
            taken_N = (place_CKS[centre_N, number] < position_N[:, None]).sum(axis=1)
            cost_N += cost_CKV[centre_N, number, taken_N]

        best = frontier(num_bytes.reshape(-1)[near], cost_N)
        self.points = near[best]
        """The points worth taking, as centre · positions + position; bytes rising, cost falling."""
        self.num_bytes = num_bytes.reshape(-1)[self.points]
        self.cost = cost_N[best]
        self.vertices = hull(self.num_bytes, self.cost)
        """The points on the lower convex hull."""

    def _near_frontier(
        self, num_bytes_CP: np.ndarray, cost_CKV: np.ndarray, order_CP: np.ndarray, is_segment_CP: np.ndarray
    ) -> np.ndarray:
        """Return the points that may be on the frontier, int64, rising: all others cost more than one with no more
        bytes, by more than what is lost to rounding where costs are subtracted step by step."""
        start_C1 = cost_CKV[:, :, 0].sum(axis=1, keepdims=True)
        saved_CP = -np.take_along_axis(np.diff(cost_CKV).reshape(len(order_CP), -1), order_CP, axis=1)
        cost_CP = np.empty(num_bytes_CP.shape)
        cost_CP[:, :1] = start_C1
        np.cumsum(np.where(is_segment_CP, saved_CP, 0.0), axis=1, out=cost_CP[:, 1:])
        np.subtract(start_C1, cost_CP[:, 1:], out=cost_CP[:, 1:])
        is_state_CP = np.ones(num_bytes_CP.shape, bool)
        is_state_CP[:, 1:] = is_segment_CP  # the others repeat the state before
        states = np.flatnonzero(is_state_CP)
        states = states[np.argsort(num_bytes_CP.reshape(-1)[states])]
        cost_S = cost_CP.reshape(-1)[states]
        rounding = 1e-9 * float(np.abs(start_C1).max(initial=0.0))
        return np.sort(states[cost_S <= np.minimum.accumulate(cost_S) + rounding])


def _options(exact_bytes: int, unit: Mapping[float, float], code_bytes: Mapping[float, int], limits: Limits) -> Options:
    """Return the options of a class whose exact copy takes `exact_bytes`. unit, code_bytes: by bits."""
    allowed = [bits for bits in sorted(unit) if limits.allows(bits)]
    option_bytes = np.array([*(code_bytes[bits] if bits else 0 for bits in allowed), exact_bytes], np.int64)
    cost = np.array([*(unit[bits] for bits in allowed), 0.0])
    labels: list[Bits] = [*allowed, "exact"]
    vertices = hull(option_bytes, cost)
    return tuple(labels[v] for v in vertices), option_bytes[vertices], cost[vertices]
