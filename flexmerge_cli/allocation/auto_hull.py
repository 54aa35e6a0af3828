"""Finds the lower convex hull and the frontier of points (bytes, cost). Numpy only; knows nothing of tensors."""

import numpy as np

# P points: bytes int64, cost float64


def hull(num_bytes: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Return the indices of the vertices of the lower convex hull, bytes rising, cost falling: int64, at least one
    if P > 0.

    Of equal points it takes the first. Save for rounding, a point on the line between two vertices is no vertex. The
    vertices are exactly the states that are cheapest for some price of a byte.
    """
    candidates = frontier(num_bytes, cost)
    bytes_at, cost_at = num_bytes[candidates].tolist(), cost[candidates].tolist()
    kept: list[int] = []
    saved: list[float] = []  # per byte, from each vertex kept to the next
    for point in range(len(candidates)):
        while kept:
            last = kept[-1]
            slope = (cost_at[last] - cost_at[point]) / (bytes_at[point] - bytes_at[last])
            if not saved or slope < saved[-1]:
                saved.append(slope)
                break
            kept.pop()
            saved.pop()
        kept.append(point)
    return candidates[kept]


def frontier(num_bytes: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Return the indices of the points that cost less than all others with no more bytes, bytes rising; the first of
    equal ones."""
    order = np.lexsort((cost, num_bytes))  # stable
    sorted_cost = cost[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_cost)[:-1]]) if len(order) else sorted_cost
    return order[sorted_cost < before]


def slopes(num_bytes: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Return the cost saved per byte from each point to the next."""
    found: np.ndarray = (cost[:-1] - cost[1:]) / np.diff(num_bytes)
    return found
