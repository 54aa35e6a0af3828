"""Bundles load in transformers: from the bundle itself, from exports, and through the API, with the same logits."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flexmerge_cli import export, make_plan, merge, open_bundle  # noqa: E402

DIGITS = Path(__file__).parent.parent / "samples" / "digits"
TASKS = sorted(path.name for path in (DIGITS / "tasks").iterdir())


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    make_plan(DIGITS / "base", {name: DIGITS / "tasks" / name for name in TASKS}, output=path)
    return path


def logits(model: "torch.nn.Module", task: str) -> "torch.Tensor":
    with np.load(DIGITS / "test" / f"{task}.npz") as data:
        pixels = torch.from_numpy(data["images"][:16].astype(np.float32) / 16 * 2 - 1).to(model.dtype)
    with torch.inference_mode():
        return model(pixel_values=pixels).logits


def load(folder: Path) -> "torch.nn.Module":
    return transformers.ViTForImageClassification.from_pretrained(folder).eval()


def test_eight_tasks_load_everywhere_with_equal_logits(plan: Path, tmp_path: Path) -> None:
    bundle = merge(plan, tmp_path / "bundle", method="average", size="2x")
    for task in TASKS:
        export(tmp_path / "bundle", task, tmp_path / task)
        export(tmp_path / "bundle", task, tmp_path / f"{task}-linked", link=True)
        models = [
            load(tmp_path / "bundle" / "tasks" / task),
            load(tmp_path / task),
            load(tmp_path / f"{task}-linked"),
            bundle.model(task),
        ]
        found = [logits(model, task) for model in models]
        assert all(torch.equal(found[0], other) for other in found[1:]), task
        assert not torch.equal(found[0], logits(load(DIGITS / "tasks" / task), task))


def test_a_bundle_of_nothing_merged_gives_the_sources_logits(plan: Path, tmp_path: Path) -> None:
    bundle = merge(plan, tmp_path / "bundle")
    for task in TASKS[:3]:
        assert torch.equal(logits(bundle.model(task), task), logits(load(DIGITS / "tasks" / task), task))


def test_a_masked_task_is_no_checkpoint_and_loads_through_the_api_and_an_export(plan: Path, tmp_path: Path) -> None:
    bundle = merge(plan, tmp_path / "bundle", method="emr")
    assert not (tmp_path / "bundle/tasks").exists()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load(tmp_path / "bundle/coded/parity")
    export(tmp_path / "bundle", "parity", tmp_path / "parity")
    assert torch.equal(logits(bundle.model("parity"), "parity"), logits(load(tmp_path / "parity"), "parity"))


def test_the_model_of_the_api_has_no_second_copy_of_dense_weights(plan: Path, tmp_path: Path) -> None:
    merge(plan, tmp_path / "bundle", method="average", size="1x")
    bundle = open_bundle(tmp_path / "bundle")
    view, model = bundle.view("digit"), bundle.model("digit")
    mapped = {tensor.data_ptr() for tensor in view.values()}
    of_model = {parameter.data_ptr() for parameter in model.parameters()}
    assert of_model <= mapped
