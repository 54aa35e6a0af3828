"""What `tune` and `calibrate --through` refuse, and with which exit code; and that one example is enough."""

import shutil

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from ..program import fails, succeeds

COMMANDS = [
    ("calibrate", "--through", "regmean", "--size", "1x"),
    *(("tune", "--method", f"{name}:steps=1") for name in ("adamerging", "concrete", "fw_merging")),
]


@pytest.fixture(scope="module")
def other(pictures, tmp_path_factory):
    """A copy of the family, in which task `b` has changed since the plan."""
    folder = tmp_path_factory.mktemp("changed") / "family"
    shutil.copytree(pictures.family.folder, folder)
    moved = folder / "tasks/b/model.safetensors"
    save_file({name: 2 * value for name, value in load_file(moved).items()}, moved, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[2])
def test_data_and_sources_that_do_not_fit_are_refused(pictures, other, tmp_path, command):
    family = pictures.family
    spec = yaml.safe_load(family.spec.read_text())
    for fields in spec["tasks"].values():
        fields["data"] = str(family.folder / fields["data"])
    np.savez(tmp_path / "wrong.npz", pictures=np.zeros((2, 3, 8, 8), np.uint8))
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 3, 8, 8), np.uint8))
    np.savez(tmp_path / "nan.npz", images=np.full((2, 3, 8, 8), np.nan, np.float32))
    name, *options = command
    options += ["-o", tmp_path / "never", "--device", "cpu", "--spec"]
    for file, code, says in (
        ("wrong.npz", 2, ("tasks.b", "pictures")),
        ("none.npz", 2, ("tasks.b", "no examples")),
        ("nan.npz", 3, ("task `b`", "are", "not finite")),
    ):
        changed = spec["tasks"] | {"b": spec["tasks"]["b"] | {"data": str(tmp_path / file)}}
        (tmp_path / "calib.yaml").write_text(yaml.safe_dump(spec | {"tasks": changed}))
        fails(code, name, family.plan_path, *options, tmp_path / "calib.yaml", says=says)
    fails(3, name, other / "plan.json", *options, other / "calib.yaml", says="task `b` has changed since the plan")
    assert not (tmp_path / "never").exists()
    succeeds(name, family.plan_path, *options, family.spec, "--examples", 1)
