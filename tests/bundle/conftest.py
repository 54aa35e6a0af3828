import pytest

from .bundles import make


@pytest.fixture(scope="session")
def merged(tmp_path_factory):
    """Four tasks with heads, merged by average to 2x: groups of one, two and more. Read only."""
    return make(tmp_path_factory.mktemp("merged"), "--method", "average", "--size", "2x")


@pytest.fixture(scope="session")
def masked(tmp_path_factory):
    """Every block one masked group. Read only."""
    return make(tmp_path_factory.mktemp("masked"), "--method", "emr")


@pytest.fixture(scope="session")
def tied(tmp_path_factory):
    """Copies, with a tied tensor. Read only."""
    return make(tmp_path_factory.mktemp("tied"), name="tied")


@pytest.fixture(scope="session")
def coded(tmp_path_factory):
    """A dense centre and a residual of two bits per task. Read only."""
    return make(tmp_path_factory.mktemp("coded"), "--method", "low_bit:bits=2")
