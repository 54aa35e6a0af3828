"""Bundles of tiny transformers models, each made once. Read only."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flexmerge_cli import make_plan, merge

from ..transformers_families import FAMILIES, TASKS, make


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A family's name and options of `merge` -> the bundle, made once; its sources lie beside it."""
    roots: dict[str, Path] = {}
    made: dict[str, Path] = {}

    def bundle(family: str, **options: object) -> Path:
        if family not in roots:
            root = roots[family] = tmp_path_factory.mktemp("family")
            make(FAMILIES[family], root)
            make_plan(root / "base", {task: root / "tasks" / task for task in TASKS}, output=root / "plan.json")
        key = f"{family} {options}"
        if key not in made:
            made[key] = roots[family] / f"bundle{len(made)}"
            merge(roots[family] / "plan.json", made[key], **options)  # type: ignore[arg-type]
        return made[key]

    return bundle
