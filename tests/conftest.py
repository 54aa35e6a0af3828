import os

import hypothesis
import pytest
import torch

from .checkpoint.hub_server import hub
from .families import ODD, Folders, plain, write_family
from .program import succeeds

__all__ = ["hub"]

# A busy machine may take any time for an example, and for drawing it. Examples are the same in every run, so that a
# change is judged by what it does; `pytest --hypothesis-profile=random` draws new ones.
UNTIMED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("random", **UNTIMED)
hypothesis.settings.register_profile("same", hypothesis.settings.get_profile("random"), derandomize=True)
hypothesis.settings.load_profile("same")


def pytest_collection_modifyitems(items):
    """The long ones first, so that no process is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """So that tests may run side by side, and sums of matrix products do not hang on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """What tests write need not outlive a power failure. Tests of what is synced put their own fsync in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which fails in the same way if the descriptor is not open
        yield


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Scores that tests leave are not the user's, and theirs are not found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Folders:
    """Four plain tasks. Read only: a test that changes a model writes a family of its own."""
    return write_family(tmp_path_factory.mktemp("family"), plain())


@pytest.fixture(scope="session")
def plan(family):
    """Its plan."""
    path = family.root / "plan.json"
    succeeds("plan", "-q", *family.arguments, "-o", path)
    return path


@pytest.fixture(scope="session")
def odd_family(tmp_path_factory):
    """Name of `ODD` -> that family on disk; read only."""
    made: dict[str, Folders] = {}

    def get(name: str) -> Folders:
        if name not in made:
            made[name] = write_family(tmp_path_factory.mktemp(name), ODD[name]())
        return made[name]

    return get


@pytest.fixture(scope="session")
def odd_plan(odd_family):
    """Name of `ODD` -> its plan.json."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = odd_family(name).root / "plan.json"
            succeeds("plan", "-q", *odd_family(name).arguments, "-o", made[name])
        return made[name]

    return get
