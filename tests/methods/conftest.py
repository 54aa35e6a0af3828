import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """So that tests may run side by side, and sums of matrix products do not hang on the machine."""
    torch.set_num_threads(1)
