"""Mixtures of experts beside SMILE as its paper gives it, written anew in float64; and all that has no tensors of them.

The paper's gate is ‖V_kᵀ x‖ for the first right singular vectors V_k of the task vector of expert k; of the softmax of
these, the largest are divided by their sum and weigh the experts U_k Σ_k V_kᵀ x, which are added to the base's W x + b.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import Tensor, nn  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from flexmerge_cli import export, open_bundle, verify  # noqa: E402
from flexmerge_cli.bundle import resident  # noqa: E402
from flexmerge_cli.bundle.read import Bundle  # noqa: E402
from flexmerge_cli.errors import UsageError  # noqa: E402
from flexmerge_cli.evaluation.loading import build_model  # noqa: E402
from flexmerge_cli.evaluation.models import bundle_model  # noqa: E402
from flexmerge_cli.stored.forms import FORMS  # noqa: E402
from flexmerge_cli.vllm_plugin import task_view  # noqa: E402

from ..program import fails, stored_sizes, succeeds  # noqa: E402
from ..transformers_families import FAMILIES, TASKS  # noqa: E402

RANK, TOP = 2, 2
SMILE = {"method": f"smile:rank={RANK},top={TOP}"}


class Smile(nn.Module):
    """One layer. w: [out, in] of the base and of each task, float64."""

    def __init__(self, w: Tensor, bias: Tensor | None, of_tasks: list[Tensor]) -> None:
        super().__init__()
        self.w, self.bias, self.experts = w, bias, [torch.linalg.svd(own - w) for own in of_tasks]

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w.T if self.bias is None else x @ self.w.T + self.bias
        gates = torch.stack([(x @ vh[:RANK].T).norm(dim=-1) for _, _, vh in self.experts], -1).softmax(-1)
        kept = gates * (gates >= gates.topk(TOP, -1).values[..., -1:])
        kept = kept / kept.sum(-1, keepdim=True)
        for place, (u, s, vh) in enumerate(self.experts):
            y = y + kept[..., place, None] * ((x @ vh[:RANK].T * s[:RANK]) @ u[:, :RANK].T)
        return y


def reference(root: Path, name: str, task: str, centre: str) -> Any:
    """The task's model with the centre's values wherever models agree in shape, and layers as above, float64."""
    family = FAMILIES[name]
    base = family.task.from_pretrained(root / "base", dtype=torch.float64, ignore_mismatched_sizes=True).state_dict()
    models = {one: family.task.from_pretrained(root / "tasks" / one, dtype=torch.float64).eval() for one in TASKS}
    model, states = models[task], [{k: v.clone() for k, v in models[one].state_dict().items()} for one in TASKS]
    shared = {key for key in base if not any(part in key for part in family.classes)}
    if centre == "average":
        base = {key: sum(state[key] for state in states) / len(states) for key in shared}
    of_model = model.state_dict()
    model.load_state_dict({key: base[key] if key in shared else value for key, value in of_model.items()})
    for path, layer in list(model.named_modules()):
        if f"{path}.weight" in shared and isinstance(layer, (nn.Linear, Conv1D)) and "lm_head" not in path:
            turned = isinstance(layer, Conv1D)
            w, *of_tasks = (s[f"{path}.weight"].T if turned else s[f"{path}.weight"] for s in (base, *states))
            bias = None if layer.bias is None else layer.bias.detach()
            model.set_submodule(path, Smile(w, bias, of_tasks))
    return model


def output(model: Any, inputs: Mapping[str, Tensor], name: str) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**inputs)[FAMILIES[name].output]
        return found


@pytest.mark.parametrize(("name", "centre"), [("vit", "base"), ("gpt2", "base"), ("vit", "average")])
def test_models_compute_what_the_paper_says(name: str, centre: str, bundle_of: Callable[..., Path]) -> None:
    path = bundle_of(name, method=f"{SMILE['method']},centre={centre}")
    bundle, inputs = open_bundle(path), FAMILIES[name].inputs()
    for task in TASKS[:2]:
        inside = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
        expected = output(reference(path.parent, name, task, centre), inside, name)
        found = output(bundle.model(task), inputs, name)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        for weights in ("dense", "packed"):
            assert torch.equal(output(bundle.runtime(weights=weights).model(task), inputs, name), found)


def test_experts_are_added_and_the_largest_gates_decide(bundle_of: Callable[..., Path]) -> None:
    """The test above would also pass if no expert changed an output."""
    inputs = FAMILIES["vit"].inputs()
    one, two, base = (
        output(open_bundle(bundle_of("vit", method=method)).model("alpha"), inputs, "vit")
        for method in (f"smile:rank={RANK},top=1", *SMILE.values(), "weighted_average:weights={alpha: 0, beta: 0}")
    )
    assert min((one - two).abs().max(), (one - base).abs().max(), (two - base).abs().max()) > 1e-4


def test_scores_are_those_of_the_mixture_and_are_cached_for_it_alone(bundle_of: Callable[..., Path]) -> None:
    """A task's own expert, whose digest is in the manifest, does not tell what else a layer adds."""
    paths = [bundle_of("vit", method=method) for method in (f"smile:rank={RANK},top=1", *SMILE.values())]
    first, second = (bundle_model(Bundle.open(path), "alpha") for path in paths)
    assert first.digest != second.digest
    inputs = FAMILIES["vit"].inputs()
    expected = output(open_bundle(paths[1]).model("alpha"), inputs, "vit")
    for _ in range(2):  # the second is built from a cached skeleton
        assert torch.equal(output(build_model(second, None, "cpu"), inputs, "vit"), expected)


def test_all_tasks_of_a_group_read_and_hold_all_experts_once(bundle_of: Callable[..., Path]) -> None:
    path = bundle_of("vit", **SMILE)
    sizes, bundle = stored_sizes(path), open_bundle(path)
    mixtures = Bundle.open(path).experts("alpha")
    assert len(mixtures) == 12  # query, key, value, output and two of the MLP in each of two layers
    assert {len(found.factors) for found in mixtures.values()} == {3}
    task, parts = bundle.manifest.tasks["alpha"], Bundle.open(path).parts
    common = [name for name in task.files if name in parts and bundle.manifest.files[name].tasks == TASKS]
    held = {part for name in common for part in parts[name]}
    assert all(f"{name}@{role}.{one}" in held for name in mixtures for role in ("left", "right") for one in TASKS)
    summary = succeeds("inspect", path, "--json").json
    assert summary["total_bytes"] == sum(sizes.values())
    first, second = (bundle.model(task).vit.layers[0].mlp.fc1 for task in TASKS[:2])
    assert first.down.data_ptr() == second.down.data_ptr() and first.weight.data_ptr() == second.weight.data_ptr()
    runtime, seen = bundle.runtime(), dict[int, int]()
    for task_name in TASKS:
        for held_tensor in (*(model := runtime.model(task_name)).parameters(), *model.buffers()):
            seen[held_tensor.data_ptr()] = held_tensor.nbytes
    scales = 4 * 3 * RANK * len(mixtures)  # one per expert and row, which a layer computes for itself
    assert sum(seen.values()) <= runtime.num_bytes["cpu"] + scales * len(TASKS)
    assert sum(found.dense for found in resident.resident(Bundle.open(path)).values()) == runtime.num_bytes["cpu"]


def test_digests_are_of_the_tasks_own_expert(bundle_of: Callable[..., Path]) -> None:
    """So damage of any factor is found, and distances say what the factors lose."""
    path = bundle_of("vit", **SMILE)
    assert verify(path, decode=True).bad == {}
    bundle = Bundle.open(path)
    name, found = next(iter(bundle.experts("beta").items()))
    left, right = (torch.from_numpy(bundle.bits(part).copy()).view(part.shape) for part in found.factors[1])
    centre = torch.from_numpy(bundle.bits(found.centre).copy()).view(found.centre.shape)
    decoded = torch.from_numpy(bundle.stored("beta", name).copy()).view(centre.shape)
    torch.testing.assert_close(decoded.view(torch.float32), centre.view(torch.float32) + left @ right)


def test_nothing_else_stands_for_a_mixture(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    path = bundle_of("vit", **SMILE)
    for options in (["--task", "alpha"], ["--all"], ["--task", "alpha", "--link"], ["--as-lora"]):
        fails(2, "export", path, *options, "-o", tmp_path / "out", says=("is a mixture of experts", "open_bundle"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="is a mixture of experts"):
        export(path, "alpha", tmp_path / "out")
    view = open_bundle(path).view("alpha")
    mixed = next(iter(view.mixtures))
    for read in (lambda: view[mixed], lambda: dict(view), lambda: task_view(str(path / "coded" / "alpha"))):
        with pytest.raises(UsageError, match="is a mixture of experts"):
            read()
    assert view[next(name for name in view if name not in view.mixtures)] is not None
    readme = (path / "coded" / "alpha" / "README.md").read_text()
    assert "export" not in readme and 'model("alpha")' in readme


def test_readers_that_know_no_mixtures_refuse_the_bundle(
    bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle_of("vit", **SMILE)
    monkeypatch.delitem(FORMS, "mixture")
    fails(3, "inspect", path, says="no form `mixture`")


def test_a_mixture_that_is_no_layer_is_refused(bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule by names took a table of embeddings for a layer."""
    from flexmerge_cli.methods import coded

    monkeypatch.setattr(coded, "has_gate", lambda tensor, shape: "wpe" in tensor)
    bundle = open_bundle(bundle_of("gpt2", method="smile:rank=1"))
    for model in (bundle.model, bundle.runtime().model):
        with pytest.raises(UsageError, match=r"`.*wpe.weight` is stored as a mixture.*of Embedding in GPT2") as caught:
            model("alpha")
        assert "--method-for" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("method", "says"),
    [("smile:rank=0", r"rank=0 is not"), ("smile:top=0", "top=0 is not"), ("smile:centre=emr", "more than one dense"),
     ("smile:centre=none", "leaves nothing"), ("smile:fraction=0.1", "no argument")],
)  # fmt: skip
def test_arguments_that_mean_nothing_are_refused(method: str, says: str, bundle_of: Callable[..., Path]) -> None:
    plan = bundle_of("vit", **SMILE).parent / "plan.json"
    fails(2, "merge", plan, "--method", method, "-o", plan.parent / "never", says=says)


def test_sizes_count_every_expert(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    plan = bundle_of("vit", **SMILE).parent / "plan.json"
    fails(6, "merge", plan, "--method", "smile:rank=2", "--size", "1x", "-o", tmp_path / "b", says="does not reach 1x")
    asked = "merge", plan, "--method", "smile:rank=2", "--size", "2.4x", "-o", tmp_path / "b"
    predicted = succeeds(*asked, "--dry-run", "--json").json
    succeeds(*asked)
    assert sum(stored_sizes(tmp_path / "b").values()) == predicted["total_bytes"]
    groups = [group for unit in open_bundle(tmp_path / "b").manifest.units for group in unit.groups]
    assert {"mixture", "copy"} <= {group.kind for group in groups}
    assert verify(tmp_path / "b", decode=True).bad == {}
