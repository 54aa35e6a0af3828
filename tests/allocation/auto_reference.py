"""`auto` in the plainest way: every centre, class and option in loops, every state in dicts. Slow.

A tensor that no task has moved is exact, in the fewest bytes.
States of a tensor are (bytes, cost, centre, options), options by class.
"""

import itertools
import math

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES, promote
from flexmerge_cli.residuals.coder import MatrixView

CENTRE_BITS = (2, 3, 4, 8, "dense")
RUNS = {0.1875: (32, 0.827851, 0.30), 0.3125: (16, 0.730326, 0.45), 0.5: (8, 0.602450, 0.65), 0.75: (4, 0.463643, 0.85)}
"""Bits -> elements of a run, what is lost of a normal distribution, and the exponent for its tails."""


def code_bytes(shape, bits):
    m, n = MatrixView.SQUEEZED.matrix(shape)
    return 2 * m + m * -(-n * bits // 8) if bits else 0


def residual_bytes(shape, bits):
    """Scales of a byte up to 2 bits, and below 1 bit the codes of up to eight rows in one piece."""
    m, n = MatrixView.SQUEEZED.matrix(shape)
    if bits in RUNS:
        run = RUNS[bits][0]
        together = max(k for k in (1, 2, 4, 8) if m % k == 0)
        return m + m // together * math.ceil(together * math.ceil(n / run) * round(math.log2(2 * run)) / 8)
    return code_bytes(shape, bits) - (m if bits <= 2 else 0)


def dense_bytes(shape, dtype):
    return math.prod(shape) * ITEM_BYTES[dtype]


def base_bytes(tensor):
    return 0 if tensor.base_is_stored else dense_bytes(tensor.shape, tensor.base_dtype)


def exact_bytes(tensor, task):
    is_stored = tensor.copy_is_stored and tensor.copy_is_stored[task]
    return 0 if is_stored else dense_bytes(tensor.shape, tensor.dtypes[task])


def price(tensor, loss):
    """What a lost part of a residual counts, times its energy."""
    if tensor.may_drop:
        return loss
    return loss / (1 - loss) if loss < 63 / 64 else 64 * loss


def table(tensor, levels, w):
    """[(centre, centre's bytes, [options of each class])], options [(bytes, cost, label)]."""
    if all(base or tensor.gram[k][k] <= 0 for k, base in enumerate(tensor.is_base)):
        return unchanged(tensor)
    least = 1e-12 * sum(tensor.gram[k][k] for k in range(len(tensor.same))) / len(tensor.same)
    representatives = sorted(set(tensor.same))
    members = {
        representative: [k for k, first in enumerate(tensor.same) if first == representative]
        for representative in representatives
    }

    def exact(representative):
        return exact_bytes(tensor, representative), 0.0, "exact"

    def copies(representative):
        coded = [
            (code_bytes(tensor.shape, b), w * len(members[representative]) * max(least, tensor.errors.average[b]), b)
            for b in (2, 3, 4, 8)
        ]
        return [*coded, exact(representative)]

    def residuals(representative, energy):
        unit = w * len(members[representative]) * max(least, energy)
        lost = dict(tensor.errors.ratio)
        for b, (_, normal, exponent) in RUNS.items():
            caught = (1 - normal) * ((1 - lost[1]) * math.pi / 2) ** exponent
            lost[b] = min(1.0, max(lost[1], 1 - caught))
        coded = [
            (residual_bytes(tensor.shape, b), unit * price(tensor, max(1e-12, lost[b])), b)
            for b in (*RUNS, 1, 2, 3, 4, 8)
        ]
        return ([(0, unit, 0)] if tensor.may_drop else []) + [*coded, exact(representative)]

    rows = [(("none",), 0, [copies(representative) for representative in representatives])]
    for bits in CENTRE_BITS:
        lost = 0.0 if bits == "dense" else tensor.errors.base[bits]
        size = base_bytes(tensor) if bits == "dense" else code_bytes(tensor.shape, bits)
        options = [
            [(0, 0.0, 0)]
            if bits == "dense" and tensor.is_base[representative]
            else residuals(representative, max(0.0, tensor.gram[representative][representative]) + lost)
            for representative in representatives
        ]
        rows.append((("base", bits), size, options))
    seen = []
    for level in sorted(levels):
        groups = [
            [representative for representative in representatives if representative in group] for group in levels[level]
        ]
        groups = sorted(group for group in groups if group)
        if groups in seen or all(len(group) == 1 for group in groups):
            continue
        seen.append(groups)
        for bits in CENTRE_BITS:
            lost = 0.0 if bits == "dense" else tensor.errors.average[bits]
            size, options = 0, {}
            for group in groups:
                tasks = sorted(k for representative in group for k in members[representative])
                if len(group) == 1:
                    options[group[0]] = copies(group[0])
                    continue
                dtype = promote([tensor.dtypes[k] for k in tasks])
                size += dense_bytes(tensor.shape, dtype) if bits == "dense" else code_bytes(tensor.shape, bits)
                within = sum(tensor.gram[i][j] for i in tasks for j in tasks) / len(tasks) ** 2
                for k in group:
                    cross = sum(tensor.gram[k][j] for j in tasks) / len(tasks)
                    options[k] = residuals(k, max(0.0, tensor.gram[k][k] - 2 * cross + within) + lost)
            rows.append(
                (("average", len(groups), bits), size, [options[representative] for representative in representatives])
            )
    return rows


def unchanged(tensor):
    """Exact: a copy of all that is distinct, or the base, where that serves, and a copy of the rest."""
    representatives = sorted(set(tensor.same))

    def exact(representative):
        return [(exact_bytes(tensor, representative), 0.0, "exact")]

    rest = [
        [(0, 0.0, 0)] if tensor.is_base[representative] else exact(representative) for representative in representatives
    ]
    return [
        (("none",), 0, [exact(representative) for representative in representatives]),
        (("base", "dense"), base_bytes(tensor), rest),
    ]


def hull(points):
    """Lower convex hull of (bytes, cost, …)."""
    kept = []
    for point in sorted(points, key=lambda p: (p[0], p[1])):
        if kept and point[1] >= kept[-1][1]:
            continue
        while len(kept) > 1 and slope(kept[-2], kept[-1]) <= slope(kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def slope(p, q):
    return (p[1] - q[1]) / (q[0] - p[0])


def curve(row):
    """States of one centre, from every class at its first vertex."""
    centre, size, options = row
    hulls = [hull(of_class) for of_class in options]
    segments = [(-slope(p, q), k, i) for k, h in enumerate(hulls) for i, (p, q) in enumerate(itertools.pairwise(h))]
    at = [0] * len(hulls)
    states = [state(centre, size, hulls, at)]
    for _, k, _ in sorted(segments):
        at[k] += 1
        states.append(state(centre, size, hulls, at))
    return states


def state(centre, size, hulls, at):
    chosen = [h[i] for h, i in zip(hulls, at)]
    return size + sum(o[0] for o in chosen), sum(o[1] for o in chosen), centre, tuple(o[2] for o in chosen)


def every_state(rows):
    """All combinations of options of all centres."""
    return [
        (size + sum(o[0] for o in chosen), sum(o[1] for o in chosen), centre, tuple(o[2] for o in chosen))
        for centre, size, options in rows
        for chosen in itertools.product(*options)
    ]


def solve(tables, budget):
    """States of all tensors, in order of the tables; None if even the smallest do not fit."""
    curves = [[point for row in rows for point in curve(row)] for rows in tables]
    hulls = [hull(points) for points in curves]
    now = [h[0] for h in hulls]
    left = budget - sum(point[0] for point in now)
    if left < 0:
        return None
    segments = [(-slope(p, q), t, i) for t, h in enumerate(hulls) for i, (p, q) in enumerate(itertools.pairwise(h))]
    for _, t, i in sorted(segments):
        added = hulls[t][i + 1][0] - now[t][0]
        if added > left:
            break
        now[t], left = hulls[t][i + 1], left - added
    while True:
        fits = [
            (t, point)
            for t, points in enumerate(curves)
            for point in points
            if point[1] < now[t][1] and point[0] <= now[t][0] + left
        ]
        free = [(now[t][1] - point[1], t, point) for t, point in fits if point[0] <= now[t][0]]
        if free:
            _, t, point = max(free, key=lambda item: item[0])
        elif fits:
            t, point = min(fits, key=lambda item: (-slope(now[item[0]], item[1]), item[1][0] - now[item[0]][0]))
        else:
            return now
        left -= point[0] - now[t][0]
        now[t] = point
