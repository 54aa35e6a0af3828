"""A task as it lies in a bundle, exported and linked loads in the libraries that the tests have."""

from importlib.util import find_spec

import pytest
import torch
import transformers

from .loaders import LOADERS, ONE, PLACES, SEVERAL, Bench
from .program import succeeds

OF_ONE_FILE = {"timm", "open_clip"}
OF_PARTS = {"sentence-transformers"}
WITHOUT_FOLDER = {"tasks/NAME": "coded", "export": "loads", "export --link": "refused"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("route", [ONE, SEVERAL])
@pytest.mark.parametrize("name", [name for name, loader in LOADERS.items() if find_spec(loader.package)])
def test_every_loader_gives_the_outputs_of_the_fine_tuned_model(name, route, place, bench):
    is_coded = name in OF_PARTS or (name in OF_ONE_FILE and route == SEVERAL)
    assert bench.cell(name, route, place) == (WITHOUT_FOLDER[place] if is_coded else "loads")


def test_a_task_of_a_bundle_on_the_hub_loads_and_is_fetched_once(hub, bench):
    """transformers takes the links for files; flexmerge then finds the same bytes in the cache."""
    root, given = bench.made("llama", SEVERAL)
    hub.add("org/bundle", root / "bundle")
    model = transformers.LlamaForCausalLM.from_pretrained("org/bundle", subfolder="tasks/one").eval()
    expected = transformers.LlamaForCausalLM.from_pretrained(root / "tasks/one").eval()
    with torch.no_grad():
        assert torch.equal(model(given).logits, expected(given).logits)
    assert {name for name in hub.sent if name.endswith(".safetensors")} == {
        f"org/bundle/tasks/one/model-0000{number}-of-00002.safetensors" for number in (1, 2)
    }
    hub.forget()
    succeeds("export", "hf://org/bundle", "--task", "one", "-o", root / "from-the-hub")
    assert [name for name in hub.sent if name.endswith(".safetensors")] == []
