from dataclasses import dataclass
from pathlib import Path

import pytest

from ..program import succeeds
from .families import Calibrated, images, texts


@dataclass(frozen=True)
class Done:
    family: Calibrated
    output: Path


@pytest.fixture(scope="session", params=["images", "texts"])
def done(request, tmp_path_factory) -> Done:
    """A family and all that is measured of it. Read only."""
    family = {"images": images, "texts": texts}[request.param](tmp_path_factory.mktemp(request.param))
    output = family.folder / "calibration"
    succeeds(*family.command(output, "--statistics", "inputs,fisher,outputs"))
    return Done(family, output)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Done:
    """Images alone. Read only."""
    family = images(tmp_path_factory.mktemp("pictures"))
    output = family.folder / "calibration"
    succeeds(*family.command(output))
    return Done(family, output)
