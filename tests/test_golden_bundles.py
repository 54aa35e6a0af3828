"""What bundles store, held against digests that golden/bundles.json keeps: a change of the code changes no bundle.

A digest is of every stored array (name, dtype, shape, bytes) and of the manifest without what depends on the machine or
the version: measured distances and errors, and digests of files. Spectral methods are left out, since
their last bits depend on the processor. `python -m tests.test_golden_bundles` writes the file anew.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from .families import ODD, normal, plain, write_checkpoint, write_family
from .program import flexmerge, succeeds

GOLDEN = Path(__file__).parent / "golden"
DIGESTS = GOLDEN / "bundles.json"
METHODS: dict[str, tuple[str, ...]] = {
    "exact": (),
    "bf16": ("--dtype", "bf16"),
    "average": ("--method", "average"),
    "average-half": ("--method", "average", "--size", "70%"),
    "ties": ("--method", "ties"),
    "ties-dare": ("--method", "ties:K=0.5,scope=tensor", "--step", "dare:p=0.5"),
    "emr": ("--method", "emr"),
    "consensus": ("--method", "consensus"),
    "tall_masks": ("--method", "tall_masks"),
    "low_bit": ("--method", "low_bit:bits=2"),
    "low_bit-8": ("--method", "low_bit:bits=1,gain=norm,centre_bits=8,scales=bfloat16,clip=search"),
    "low_bit-none": ("--method", "low_bit:bits=4,centre=none"),
    "bitdelta": ("--method", "bitdelta"),
    "sparse": ("--method", "sparse"),
    "mixed": ("--method", "average", "--method-for", "*attention*=emr", "--method-for", "*embeddings*=keep"),
    "clusters": ("--method", "average", "--cluster", "channels", "--size", "2x"),
    "auto": ("--method", "auto", "--max-distance", "0.5"),
}
FAMILIES = ("plain", "mixed_dtypes", "heads", "running_statistics", "resized_vocabulary", "duplicates", "zero_task",
            "small_shapes", "wrapped_tasks", "tied", "private_only")  # fmt: skip
ADAPTERS = {
    "kept": {"exact": (), "average": ("--method", "average"), "emr": ("--method", "emr")},
    "merged": {"exact": (), "low_bit": ("--method", "low_bit:bits=2")},
    "pooled": {"exact": (), "average": ("--method", "average")},
}
PEFT = "base_model.model"
MEASURED = ("distance", "errors", "sha256", "xxh3", "id", "plan", "generator", "build", "request")


def digest(bundle: Path) -> str:
    """64 hexadecimal digits of what a bundle stores."""
    whole = hashlib.sha256()
    for path in sorted(path for path in bundle.rglob("*.safetensors") if not path.is_symlink()):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        whole.update(f"{path.relative_to(bundle)} {json.dumps(header, sort_keys=True)}".encode())
        whole.update(data[8 + size :])
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    whole.update(json.dumps(_unmeasured(manifest), sort_keys=True).encode())
    return whole.hexdigest()


def _unmeasured(value: object) -> object:
    if isinstance(value, dict):
        return {key: _unmeasured(item) for key, item in value.items() if key not in MEASURED}
    return [_unmeasured(item) for item in value] if isinstance(value, list) else value


def bundles(root: Path, plan: Path, methods: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Method -> digest of its bundle, or `exit N` where this family cannot be packed so."""
    found = {}
    for name, options in methods.items():
        result = flexmerge("merge", plan, *options, "-o", root / name, "-q")
        found[name] = digest(root / name) if result.code == 0 else f"exit {result.code}"
    return found


def adapter_plan(root: Path, mode: str) -> Path:
    """Two LoRAs, and beside them, unless all are pooled, vectors of (IA)³ and a full fine-tune."""
    models = plain(num_tasks=1)
    write_checkpoint(root / "base", models.base)
    query, dense = "encoder.layer.0.attention.self.query", "encoder.layer.1.intermediate.dense"
    for number, name in enumerate(("one", "two")):
        factors = {
            f"{PEFT}.{query}.lora_A.weight": normal(10 + number, 2, 8),
            f"{PEFT}.{query}.lora_B.weight": normal(20 + number, 8, 2),
        }
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"]}
        write_adapter(root / "tasks" / name, factors, config)
    if mode != "pooled":
        config = {"peft_type": "IA3", "target_modules": ["intermediate.dense"], "feedforward_modules": []}
        write_adapter(root / "tasks/three", {f"{PEFT}.{dense}.ia3_l": 1 + normal(30, 16, 1)}, config)
        write_checkpoint(root / "tasks/full", models.tasks["task0"])
    word = {"kept": "keep", "merged": "merge", "pooled": "pool"}[mode]
    options = ("--adapters", word, "--assume-base", "-o", root / "plan.json", "-q")
    succeeds("plan", "--base", root / "base", "--tasks", root / "tasks", *options)
    return root / "plan.json"


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))


def odd_bundles(root: Path, name: str) -> dict[str, str]:
    family = write_family(root, ODD[name]())
    succeeds("plan", *family.arguments, "-o", root / "plan.json", "-q")
    return bundles(root, root / "plan.json", METHODS)


def adapter_bundles(root: Path, mode: str) -> dict[str, str]:
    return bundles(root, adapter_plan(root, mode), ADAPTERS[mode])


MAKERS: dict[str, Callable[[Path], dict[str, str]]] = {
    **{name: lambda root, name=name: odd_bundles(root, name) for name in FAMILIES},  # type: ignore[misc]
    **{f"adapters {mode}": lambda root, mode=mode: adapter_bundles(root, mode) for mode in ADAPTERS},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", MAKERS)
def test_bundles_store_what_they_stored(name, tmp_path):
    assert MAKERS[name](tmp_path) == json.loads(DIGESTS.read_text())[name]


if __name__ == "__main__":
    written = {}
    for name, maker in MAKERS.items():
        with tempfile.TemporaryDirectory() as folder:
            written[name] = maker(Path(folder))
        print(name, {key: value[:12] for key, value in written[name].items()}, file=sys.stderr)
    DIGESTS.write_text(json.dumps(written, indent=1) + "\n")
