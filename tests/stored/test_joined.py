"""A tensor that is joined from rows: whole, by rows, and in the products of a runtime that leaves it packed."""

from dataclasses import replace

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.nn import functional

from flexmerge_cli.checkpoint.change import LowRankChange
from flexmerge_cli.checkpoint.dtypes import NUMPY
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.serving.weight import PackedWeight
from flexmerge_cli.stored.adapted import AdaptedTensor
from flexmerge_cli.stored.decoding import RouteParts
from flexmerge_cli.stored.dense import DenseTensor
from flexmerge_cli.stored.joined import JoinedTensor

SHARED, OWN, N = 6, 3, 8


def test_rows_of_a_kept_adapter_beside_rows_of_its_own_are_decoded_alone_and_together(tmp_path):
    shapes = {"base": (SHARED, N), "left": (SHARED, 2), "right": (2, N), "own": (OWN, N)}
    draw = np.random.default_rng(0)
    arrays = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(arrays, tmp_path / "parts.safetensors")
    of, reader = read_header(tmp_path / "parts.safetensors")[0], Reader()

    def read(part, at):
        start, stop, _ = at.indices(part.num_elements)
        return reader.read(part, start, stop, np.empty(part.num_bytes, np.uint8)).view(NUMPY[part.dtype])

    change = LowRankChange(left=of["left"], right=of["right"], scale=0.5)
    joined = JoinedTensor(
        shared=AdaptedTensor(
            of_base=of["base"], changed=replace(of["base"], change=change), dtype="F32", shape=(SHARED, N)
        ),
        own=DenseTensor(part=of["own"], dtype="F32", shape=(OWN, N)),
        common=((1, 2), (4, 4)),
        rows=SHARED + OWN,
    )
    parts = RouteParts(tmp_path, "task")
    expected = np.empty((SHARED + OWN, N), np.float32)
    expected[[1, 2, 4, 5, 6, 7]] = arrays["base"] + 0.5 * (arrays["left"] @ arrays["right"])
    expected[[0, 3, 8]] = arrays["own"]
    whole = torch.from_numpy(joined.decode(parts, read).view(np.float32))
    torch.testing.assert_close(whole, torch.from_numpy(expected))
    assert joined.packable is joined and joined.fits(parts)

    held = PackedWeight(joined.packed(parts, read), tuple(whole.shape), torch.float32)
    rows, x = torch.tensor([8, 0, 3, 3, 7]), torch.randn(3, N, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(held.decoded(), whole)
    torch.testing.assert_close(functional.embedding(rows, held), whole[rows])
    torch.testing.assert_close(functional.linear(x, held), x @ whole.T)
