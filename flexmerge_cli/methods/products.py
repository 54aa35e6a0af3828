"""Merges the factors of matrices by their products: those of a group in, two of the same rank out. Pure.

The ΔW = B · A of modules are compared and merged, never A and B, which are unique only up to a rotation. A linear
method's Σ w ΔW is the product of the stacked factors [w₁B₁ … w_kB_k] and [A₁; …; A_k]; its truncated singular value
decomposition follows from that of the small core between their QR factors, and ΔW is never formed. Other methods get
the ΔW of one module at a time. The scale of the factors (alpha over r) is equal for all tasks and not applied.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.family.factors import factor_pairs
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.linear import average, task_arithmetic, weighted_average
from flexmerge_cli.methods.method import UNDECLARED, Where, nothing, nowhere

LINEAR = (average, task_arithmetic, weighted_average)


def merges_products(call: Call) -> bool:
    """Return whether a method can merge the ΔW of one module, without other tensors, into one value."""
    return call.method.gives_one_model and call.statistics is None and call.scope != "block"


def product_call(call: Call) -> Call:
    """Apply the method to the factors of all modules of a block: {name: [k, *shape]} -> {name: [*shape]}."""

    def merge_factors(deltas: Mapping[str, Tensor], where: Where) -> dict[str, Tensor]:
        found = {}
        for a, b in factor_pairs(deltas):
            a_kRN, b_kMR = (value.flatten(2).double() for value in (deltas[a], deltas[b]))
            left, right = _merged(call, a_kRN, b_kMR, where)
            found[a] = right.float().reshape(deltas[a].shape[1:])
            found[b] = left.float().reshape(deltas[b].shape[1:])
        for name in set(deltas) - set(found):  # the other factor is the same in all tasks, and is copied
            found[name] = torch.einsum("k,k...->...", _weights(call, where), deltas[name].double()).float()
        return found

    method = replace(
        call.method, function=merge_factors, scope="block", elementwise=nowhere, statistics=nothing,
        workspace=UNDECLARED, parameters={}, wants_where=True, wants_stats=False, wants_unstepped=False,
    )  # fmt: skip
    return Call(method=method, args={}, text=call.text, short=call.short)


def product_workspace(call: Call, num_tasks: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the bytes that merging the factors of a block's modules takes, beside their deltas: one module at a
    time."""
    kept = 16 * sum(math.prod(shape) for shape in shapes.values())
    largest = 0
    for a, b in factor_pairs(shapes):
        r, n, m = shapes[a][0], math.prod(shapes[a][1:]), shapes[b][0]
        factors = 8 * num_tasks * r * (m + n)
        if call.method in LINEAR:
            taken = 6 * factors + 6 * 8 * (num_tasks * r) ** 2
        else:
            taken = factors + 12 * num_tasks * m * n + max(call.workspace(num_tasks, (m, n)), 6 * 8 * m * n)
        largest = max(largest, taken)
    return kept + largest


def truncated_product(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Find the product of rank r nearest to theirs, split evenly. float64 [m, s], [s, n] -> [m, r], [r, n]."""
    q_left, t_left = torch.linalg.qr(left)
    q_right, t_right = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(t_left @ t_right.T, full_matrices=False)
    root = values[:rank].sqrt()
    left, right = q_left @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ q_right.T
    missing = rank - len(root)  # a module thinner than its rank
    return torch.nn.functional.pad(left, (0, missing)), torch.nn.functional.pad(right, (0, 0, 0, missing))


def product_gram(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Compute ⟨B_i A_i, B_j A_j⟩ of matrices [r, n] and [m, r], float64 [k, k]: tr (B_iᵀB_j)(A_jA_iᵀ)."""
    left = torch.stack([value.flatten(1).double() for value in b])
    right = torch.stack([value.flatten(1).double() for value in a])
    k, _, r = left.shape
    of_left, of_right = left.permute(1, 0, 2).reshape(-1, k * r), right.reshape(k * r, -1)
    gram = ((of_left.T @ of_left) * (of_right @ of_right.T)).view(k, r, k, r).sum((1, 3))
    return (gram + gram.T) / 2


def _merged(call: Call, a_kRN: Tensor, b_kMR: Tensor, where: Where) -> tuple[Tensor, Tensor]:
    k, r, n = a_kRN.shape
    if call.method in LINEAR:
        weighted = b_kMR * _weights(call, where)[:, None, None]
        return truncated_product(weighted.permute(1, 0, 2).reshape(-1, k * r), a_kRN.reshape(k * r, n), r)
    deltas = (b_kMR @ a_kRN).float()
    if not bool(torch.isfinite(deltas).all()):
        raise DataError(
            f"a ΔW in `{where.tensor}` exceeds the range of float32", hint="get sound copies of the adapters"
        )
    inside = Where(tasks=where.tasks, tensor=where.tensor, start=0, shape=tuple(deltas.shape[1:]))
    scope = call.scope_of(where.tensor, inside.shape)
    merged = call(deltas.flatten(1) if scope == "element" else deltas, inside).double().reshape(inside.shape)
    u, values, v = torch.linalg.svd(merged, full_matrices=False)
    root = values[:r].sqrt()
    pad = r - len(root)
    left, right = u[:, :r] * root, root[:, None] * v[:r]
    return torch.nn.functional.pad(left, (0, pad)), torch.nn.functional.pad(right, (0, 0, 0, pad))


def _weights(call: Call, where: Where) -> Tensor:
    """Find the weights of a linear method by applying it to unit vectors. float64 [k]."""
    if call.method not in LINEAR:
        raise UsageError(f"`{call.method.name}` cannot merge adapters that share a factor", hint="use average")
    found: Tensor = call(torch.eye(len(where.tasks)), where).double()
    return found
