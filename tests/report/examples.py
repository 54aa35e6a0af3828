"""The golden family as a plan and as bundles on disk, made once a test run. A test that changes one copies it."""

import functools
import shutil
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "family"


@functools.cache
def plan_path() -> Path:
    from flexmerge_cli import make_plan

    tasks = {path.name: path for path in sorted((GOLDEN / "tasks").iterdir())}
    make_plan(GOLDEN / "base", tasks, output=_folder() / "plan.json", device="cpu")
    return _folder() / "plan.json"


@functools.cache
def bundle_path(method: str | None, size: str | None) -> Path:
    from flexmerge_cli import merge

    place = _folder() / f"{method}-{size}"
    merge(plan_path(), place, method=method, size=size, device="cpu")
    return place


def copy_of(bundle: Path, place: Path) -> Path:
    return Path(shutil.copytree(bundle, place))


@functools.cache
def _temporary() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="flexmerge-examples-")


def _folder() -> Path:
    return Path(_temporary().name)
