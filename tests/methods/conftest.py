from collections.abc import Mapping

import pytest
import torch

from flexmerge_cli import native
from flexmerge_cli.methods import places, selection
from flexmerge_cli.residuals import sparse


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """So that tests may run side by side, and sums of matrix products do not hang on the machine."""
    torch.set_num_threads(1)


def break_ties_by_index(patch: pytest.MonkeyPatch, first: Mapping[str, int] | None = None) -> None:
    """Keep the elements of the lowest index among those of equal magnitude, as the reference that made golden/ does.

    first: where a tensor begins in a scope of several.
    """
    patch.setattr(native, "lib", None)  # it draws tie numbers itself
    for module in (places, selection, sparse):
        patch.setattr(
            module, "tie_numbers", lambda tensor, indices: (indices + (first or {}).get(tensor, 0)) * 2.0**-53
        )


@pytest.fixture
def ties_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    break_ties_by_index(monkeypatch)
