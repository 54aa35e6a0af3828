"""What hypothesis draws for methods: values with ties, cancellations and extremes, in scopes of few or no elements."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

# Torch's first call may take longer than any deadline that is worth having.
quick = settings(deadline=None, max_examples=30)
few = settings(quick, max_examples=12)

tied = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 0.25])
extreme = st.sampled_from([1e-30, -1e-45, 3e38, -1e-38])
anything = st.one_of(tied, extreme, st.floats(width=32, allow_nan=False, allow_infinity=False))
sizes = st.sampled_from([0, 1, 2, 5, 99])


def rows(num_rows, shape, elements):
    """[R, *shape] float32; most elements are alike where there are many."""
    return arrays("float32", (num_rows, *shape), elements=elements, fill=elements).map(torch.from_numpy)


@st.composite
def scopes(draw, elements=anything, max_rows=3):
    """[R, n] by tensor."""
    num_rows = draw(st.integers(1, max_rows))
    lengths = draw(st.lists(sizes, min_size=1, max_size=3))
    return {f"t{number}": draw(rows(num_rows, (n,), elements)) for number, n in enumerate(lengths)}
