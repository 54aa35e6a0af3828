import pytest

from .curves import Digits, digits


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Digits:
    """Read only."""
    return digits(tmp_path_factory.mktemp("digits"))
