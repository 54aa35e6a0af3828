"""What `inspect` tells of memory from headers alone is what a runtime holds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flexmerge_cli import open_bundle  # noqa: E402
from flexmerge_cli.bundle import resident  # noqa: E402
from flexmerge_cli.cli.app import run  # noqa: E402

AUTO = {"method": "auto", "size": "1.5x"}


@pytest.fixture(autouse=True)
def _every_weight_stays_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "LEAST_ELEMENTS", 0)


def inspected(bundle: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    assert run(["inspect", str(bundle), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["resident"]


FORMS = [{"method": "average", "size": "2x"}, {"method": "emr"}, {"method": "sparse:density=0.3"}]
CASES = [(name, AUTO) for name in ("vit", "bert with its prefix", "t5", "llama, tied", "gpt2", "whisper", "resnet")]
CASES += [("bert with its prefix", options) for options in FORMS]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: case if isinstance(case, str) else case["method"])
def test_inspect_tells_the_bytes_of_a_runtime(
    name: str, options: dict, bundle_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle_of(name, **options)
    told = inspected(path, capsys)
    for weights in ("dense", "packed"):
        runtime = open_bundle(path).runtime(weights=weights)
        found = runtime.describe()
        assert told[f"{weights}_bytes"] == sum(held.num_bytes for held in found)
    names = {own: name for task in runtime._bundle.manifest.tasks.values() for name, own in task.names.items()}
    packed = {names.get(held.name, held.name) for held in found if held.part}
    assert {name for name, held in told["weights"].items() if held["stays_packed"]} == packed
    assert bool(packed) == (options["method"] != "average")
