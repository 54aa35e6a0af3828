"""The support table of docs/checkpoints.md: every cell is run on a tiny model of its architecture."""

import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
if transformers.__version__ < "5":
    pytest.skip("the table is that of transformers 5", allow_module_level=True)

from safetensors.torch import load_file, save_file  # noqa: E402

from flexmerge_cli import export, make_plan, merge  # noqa: E402
from flexmerge_cli.checkpoint.reader import Reader  # noqa: E402
from flexmerge_cli.planning.sources import open_family  # noqa: E402
from flexmerge_cli.request.plan import PlanRequest  # noqa: E402

from .program import ROOT  # noqa: E402
from .support_families import ARCHITECTURES  # noqa: E402

COLUMNS = ["plan", "exact round trip", "LoRA over its base", "saved from memory", "base from memory"]


def table() -> dict[str, list[str]]:
    text = (ROOT / "docs/checkpoints.md").read_text()
    found = re.search(r"^\| model \| (.*) \|\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found is not None and found[1].split(" | ") == COLUMNS
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in found[2].splitlines()]
    return {name: cells for name, *cells in rows}


def test_the_table_has_all_architectures_and_says_yes_of_every_cell():
    """A cell that is not `yes` needs its reason, and a test of the error."""
    assert set(table()) == set(ARCHITECTURES)
    assert all(cell == "yes" for cells in table().values() for cell in cells)


@pytest.fixture(params=ARCHITECTURES, scope="module")
def made(request, tmp_path_factory):
    """The architecture, and a folder with a base, a fine-tune, and both with the names that they have in memory."""
    kind, root = ARCHITECTURES[request.param], tmp_path_factory.mktemp("support")
    torch.manual_seed(0)
    (kind.base or kind.model)(kind.config()).save_pretrained(root / "base")
    tuned = kind.model.from_pretrained(root / "base")
    with torch.no_grad():
        for value in tuned.parameters():
            value.add_(0.05 * torch.randn_like(value))
    tuned.save_pretrained(root / "tuned")
    save_from_memory((kind.base or kind.model).from_pretrained(root / "base"), root / "base", root / "base-memory")
    save_from_memory(tuned, root / "tuned", root / "tuned-memory")
    return kind, root


def save_from_memory(model, beside: Path, folder: Path) -> None:
    """Under the names of its parameters, as training loops save it, not under those of files."""
    state: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in model.state_dict().items():
        state.setdefault(value.data_ptr(), (name, value))  # tied ones once, under the name of the embedding
    folder.mkdir()
    save_file(dict(state.values()), folder / "model.safetensors")
    (folder / "config.json").write_bytes((beside / "config.json").read_bytes())


def unmerged(base: Path, task: Path) -> list[str]:
    """Floating-point tensors of the task that do not merge with one of the base, heads apart."""
    family = open_family(PlanRequest(base=str(base), tasks={"task": str(task)}))
    return [
        f"{tensor.name}: {tensor.reason}"
        for tensor in family.tensors
        if tensor.tensor_class not in ("mergeable", "tied", "base-only")
        and tensor.tasks[0] is not None
        and tensor.tasks[0].dtype.startswith(("F", "BF"))
        and tensor.reason not in ("task head", "running statistic")
    ]


def test_plan(made):
    _, root = made
    assert unmerged(root / "base", root / "tuned") == []


@pytest.mark.parametrize("task", ["tuned", "tuned-memory"])
def test_exact_round_trip(task, made, tmp_path):
    _, root = made
    make_plan(root / "base", {"task": root / task}, output=tmp_path / "plan.json", statistics="gram")
    merge(tmp_path / "plan.json", tmp_path / "bundle")
    export(tmp_path / "bundle", "task", tmp_path / "out")
    found, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", root / task))
    assert set(found) == set(source) and all(torch.equal(found[name], source[name]) for name in source)


def test_lora_over_its_base(made, tmp_path):
    kind, root = made
    model = peft.get_peft_model(
        kind.model.from_pretrained(root / "base"), peft.LoraConfig(r=2, target_modules=kind.lora)
    )
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.normal_()
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    family = open_family(PlanRequest(base=str(root / "base"), tasks={"task": str(tmp_path / "lora")}, assume_base=True))
    (kept,) = family.kept
    expected = load_file(tmp_path / "merged/model.safetensors")
    before = load_file(root / "base/model.safetensors")
    changed = {name for name, tensor in kept.model.tensors.items() if tensor.change is not None}
    assert len(changed) == len(kept.adapter.factors)
    if not changed <= set(expected):  # the file has in one tensor what the adapter changes apart
        sources = {"task": tmp_path / "lora"}
        make_plan(root / "base", sources, output=tmp_path / "plan.json", adapters="merge", assume_base=True)
        merge(tmp_path / "plan.json", tmp_path / "bundle")
        export(tmp_path / "bundle", "task", tmp_path / "out")
        found = kind.model.from_pretrained(tmp_path / "out").state_dict()
        assert all(torch.allclose(found[name], value, atol=1e-4) for name, value in merged.state_dict().items())
        return
    with Reader() as reader:
        for name, tensor in kept.model.tensors.items():
            bits = reader.read(tensor, 0, tensor.num_elements, np.empty(tensor.num_bytes, np.uint8))
            other = expected[name] if name in expected else before[name]  # of the tower that was not trained
            if tensor.dtype == "F32":
                assert np.allclose(bits.view(np.float32), other.flatten().numpy(), atol=1e-4), name
            assert name in expected or name not in changed


def test_saved_from_memory(made):
    _, root = made
    assert unmerged(root / "base", root / "tuned-memory") == []


def test_base_from_memory(made):
    _, root = made
    assert unmerged(root / "base-memory", root / "tuned") == []
