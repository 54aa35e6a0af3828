"""Real small models on disk: a base and its fine-tunes, each family odd in one known way.

`ODD` holds them by name; `write_family` puts one on disk in any layout. All numbers come from the seed, so a family is
the same in every run. Weights are of size 1, changes of size 0.05: far above every rounding.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

LAYOUTS = ("file", "shards", "bin", "pt", "bin-shards")


@dataclass(kw_only=True)
class Models:
    """A family in memory."""

    base: State
    tasks: dict[str, State]
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Task -> config.json, where it has one."""


@dataclass(frozen=True, kw_only=True)
class Folders:
    """A family on disk: `root/base`, `root/tasks/NAME`."""

    root: Path
    base: Path
    tasks: dict[str, Path]
    models: Models

    @property
    def arguments(self) -> list[str]:
        """The arguments of `flexmerge plan`."""
        return ["--base", str(self.base), "--tasks", str(self.root / "tasks")]

    @property
    def sources(self) -> dict[str, str]:
        return {name: str(path) for name, path in self.tasks.items()}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def encoder(seed: int = 0, *, layers: int = 2, width: int = 8, dtype: torch.dtype = torch.float32) -> State:
    """Names of a BERT: 3 + 4·layers blocks."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (11, width),
        "embeddings.LayerNorm.weight": (width,),
    }
    for layer in range(layers):
        path = f"encoder.layer.{layer}"
        shapes |= {
            f"{path}.attention.self.query.weight": (width, width),
            f"{path}.attention.self.query.bias": (width,),
            f"{path}.attention.output.LayerNorm.weight": (width,),
            f"{path}.intermediate.dense.weight": (2 * width, width),
            f"{path}.output.dense.weight": (width, 2 * width),
            f"{path}.output.LayerNorm.weight": (width,),
        }
    shapes["pooler.dense.weight"] = (width, width)
    return {name: normal(1000 * seed + i, *shape, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


def tuned(base: State, seed: int, *, size: float = 0.05, dtype: torch.dtype | None = None) -> State:
    """Every floating tensor moved a little; the rest as it was."""
    return {
        name: (value.float() + size * normal(7919 * seed + i, *value.shape)).to(dtype or value.dtype)
        if value.is_floating_point()
        else value.clone()
        for i, (name, value) in enumerate(base.items())
    }


def plain(dtype: torch.dtype = torch.float32, *, num_tasks: int = 4, layers: int = 2, width: int = 8) -> Models:
    """Nothing odd. Task vectors have a common part, so that some pairs are nearer than others."""
    base = encoder(dtype=dtype, layers=layers, width=width)
    common = tuned(base, 100)
    tasks = {}
    for number in range(num_tasks):
        mixed = {
            name: (value.float() + (common[name].float() - value.float()) * (number % 3) / 2)
            for name, value in base.items()
        }
        tasks[f"task{number}"] = tuned(mixed, number + 1, dtype=dtype)
    return Models(base=base, tasks=tasks)


def bf16_of_fp32() -> Models:
    """bf16 fine-tunes of an fp32 base."""
    base = encoder()
    return Models(base=base, tasks={f"task{n}": tuned(base, n, dtype=torch.bfloat16) for n in range(4)})


def mixed_dtypes() -> Models:
    """Each task in a dtype of its own: fp32, bf16, fp16, and one that has two of them."""
    base = encoder()
    two = {name: value.half() if "attention" in name else value.bfloat16() for name, value in tuned(base, 4).items()}
    return Models(
        base=base,
        tasks={
            "single": tuned(base, 1),
            "brain": tuned(base, 2, dtype=torch.bfloat16),
            "half": tuned(base, 3, dtype=torch.float16),
            "two": two,
        },
    )


def doubles() -> Models:
    """float64, which is merged through float32 and copied exactly."""
    base = {name: value.double() for name, value in encoder().items()}
    tasks = {
        f"task{n}": {name: value + 0.05 * normal(n, *value.shape).double() for name, value in base.items()}
        for n in range(3)
    }
    return Models(base=base, tasks=tasks)


def heads() -> Models:
    """Heads of other shapes, of one shape, and one that is missing; the base has none."""
    models = plain()
    for number, (name, labels) in enumerate(zip(models.tasks, (2, 2, 5, None))):
        if labels is not None:
            models.tasks[name]["classifier.weight"] = normal(500 + number, labels, 8)
            models.tasks[name]["classifier.bias"] = normal(600 + number, labels)
    return models


def buffers() -> Models:
    """Integers and booleans: equal in all, equal in some, all different; zero in the base."""
    models = plain()
    models.base["embeddings.position_ids"] = torch.arange(11)[None]
    models.base["encoder.count"] = torch.tensor(0)
    models.base["encoder.mask"] = torch.tensor([True, False, True])
    for number, state in enumerate(models.tasks.values()):
        state["embeddings.position_ids"] = torch.arange(11)[None]
        state["encoder.count"] = torch.tensor(number // 2)
        state["encoder.mask"] = torch.tensor([bool(number & 1), bool(number & 2), False])
    return models


def running_statistics() -> Models:
    """A ResNet's names: running means are a task's own, and `fc` is its head."""
    base: State = {}
    for number, name in enumerate(("conv1", "layer1.0.conv1", "layer4.0.conv1")):
        base[f"{name}.weight"] = normal(number, 4, 3, 3, 3)
    base |= {"bn1.weight": normal(10, 4), "bn1.bias": normal(11, 4), "bn1.running_mean": normal(12, 4)}
    base |= {"bn1.running_var": normal(13, 4).abs(), "bn1.num_batches_tracked": torch.tensor(5)}
    base |= {"fc.weight": normal(14, 6, 4), "fc.bias": normal(15, 6)}
    return Models(base=base, tasks={f"task{n}": tuned(base, n + 1) for n in range(3)})


def resized_vocabulary() -> Models:
    """One task has more words than the base."""
    models = plain()
    name = "embeddings.word_embeddings.weight"
    models.tasks["task1"][name] = torch.cat([models.tasks["task1"][name], normal(77, 3, 8)])
    return models


def reshaped() -> Models:
    """A head of another shape in the base than in any task; the last task decides which layers merge."""
    models = plain()
    models.base["classifier.weight"] = normal(58, 7, 8)
    for number, state in enumerate(models.tasks.values()):
        state["classifier.weight"] = normal(500 + number, 2 + number, 8)
    state["pooler.dense.weight"] = normal(59, 8, 9)
    frozen = "embeddings.word_embeddings.weight"
    for state in list(models.tasks.values())[:-1]:
        state[frozen] = models.base[frozen].clone()
    return models


def constants() -> Models:
    """Tensors that no fine-tune touched, and one that all changed alike."""
    models = plain()
    for state in models.tasks.values():
        state["embeddings.word_embeddings.weight"] = models.base["embeddings.word_embeddings.weight"].clone()
        state["pooler.dense.weight"] = normal(55, 8, 8)
    return models


def base_only() -> Models:
    """The base has a head that no task kept."""
    models = plain()
    models.base["lm_predictions.dense.weight"] = normal(3, 8, 8)
    return models


def duplicates() -> Models:
    """Two tasks are the same model, and a third shares half of its tensors with them."""
    models = plain()
    models.tasks["task2"] = {name: value.clone() for name, value in models.tasks["task0"].items()}
    for name in list(models.base)[::2]:
        models.tasks["task3"][name] = models.tasks["task0"][name].clone()
    return models


def zero_task() -> Models:
    """A task that is the base, and one that is so in some tensors."""
    models = plain()
    models.tasks["task1"] = {name: value.clone() for name, value in models.base.items()}
    for name in list(models.base)[::3]:
        models.tasks["task2"][name] = models.base[name].clone()
    return models


def all_zero() -> Models:
    """Every task is the base."""
    base = encoder()
    return Models(
        base=base, tasks={f"task{n}": {name: value.clone() for name, value in base.items()} for n in range(3)}
    )


def small_shapes() -> Models:
    """Scalars, one element, no element, and sizes that fill no byte of a mask."""
    base = {
        "scale": normal(1),
        "blocks.0.mlp.weight": normal(2, 1, 1),
        "blocks.0.mlp.bias": normal(3, 0),
        "blocks.0.attn.weight": normal(4, 3, 3),
        "blocks.1.attn.weight": normal(5, 0, 4),
        "blocks.1.mlp.weight": normal(6, 17),
        "blocks.1.mlp.bias": normal(7, 8),
    }
    return Models(base=base, tasks={f"task{n}": tuned(base, n + 1) for n in range(5)})


def one_task() -> Models:
    return plain(num_tasks=1)


def two_tasks() -> Models:
    return plain(num_tasks=2)


def private_only() -> Models:
    """Fine-tunes that differ in their heads alone, as linear probes do."""
    base = encoder()
    tasks = {}
    for number in range(3):
        tasks[f"task{number}"] = {name: value.clone() for name, value in base.items()} | {
            "classifier.weight": normal(number, 4, 8),
            "classifier.bias": normal(30 + number, 4),
            "position_ids": torch.tensor([number, 1, 2]),
        }
    return Models(base=base, tasks=tasks)


def wrapped_tasks() -> Models:
    """Fine-tunes call the base's tensors `bert.…`, all but one."""
    models = heads()
    for name in ("task0", "task1", "task2"):
        models.tasks[name] = {
            key if key.startswith("classifier") else f"bert.{key}": value for key, value in models.tasks[name].items()
        }
    return models


def wrapped_base() -> Models:
    """The base calls its tensors `model.…`, the fine-tunes do not."""
    models = heads()
    models.base = {f"model.{key}": value for key, value in models.base.items()}
    return models


def confusing_names() -> Models:
    """task0 wraps its tensors; task1 does not, and has one of its own by the name of a wrapped one."""
    models = plain(num_tasks=3)
    models.tasks["task0"] = {f"model.{key}": value for key, value in models.tasks["task0"].items()}
    models.tasks["task1"]["model.pooler.dense.weight"] = normal(99, 8, 8)
    return models


def tied() -> Models:
    """The config ties the output layer to the embedding, and both are stored."""
    models = plain()
    for state in [models.base, *models.tasks.values()]:
        state["embed_tokens.weight"] = state.pop("embeddings.word_embeddings.weight")
        state["lm_head.weight"] = state["embed_tokens.weight"].clone()
    config = {"model_type": "test", "tie_word_embeddings": True}
    models.configs = dict.fromkeys(models.tasks, config)
    return models


def outliers() -> Models:
    """Numbers at the ends of float16, subnormal ones, and both zeros."""
    models = plain(num_tasks=3)
    for number, state in enumerate(models.tasks.values()):
        flat = state["pooler.dense.weight"].view(-1)
        flat[:6] = torch.tensor([65504.0, -65504.0, 6e-8, -1e-40, 0.0, -0.0])
        flat[6] = number
    return models


ODD: dict[str, Callable[[], Models]] = {
    "plain": plain,
    "bf16": lambda: plain(torch.bfloat16),
    "fp16": lambda: plain(torch.float16),
    **{
        function.__name__: function
        for function in (
            bf16_of_fp32, mixed_dtypes, doubles, heads, buffers, running_statistics, resized_vocabulary, reshaped,
            constants, base_only, duplicates, zero_task, all_zero, small_shapes, one_task, two_tasks, private_only,
            wrapped_tasks, wrapped_base, confusing_names, tied, outliers,
        )
    },
}  # fmt: skip


def write_family(root: Path, models: Models, *, layout: str = "file", side_files: bool = True) -> Folders:
    """side_files: a config and a tokenizer beside the weights of every task."""
    write_checkpoint(root / "base", models.base, layout=layout)
    tasks = {}
    for name, state in models.tasks.items():
        tasks[name] = root / "tasks" / name
        write_checkpoint(tasks[name], state, layout=layout)
        if side_files:
            config = models.configs.get(name, {"model_type": "test", "tie_word_embeddings": False})
            (tasks[name] / "config.json").write_text(json.dumps(config))
            (tasks[name] / "vocab.txt").write_text("the\nsame\nin\nall\n")
            (tasks[name] / "README.md").write_text(f"# {name}\n")
    return Folders(root=root, base=root / "base", tasks=tasks, models=models)


def write_checkpoint(folder: Path, state: State, *, layout: str = "file") -> None:
    """`file` is one safetensors, `shards` three; `bin` and `pt` what torch.save writes, `bin-shards` two bins."""
    folder.mkdir(parents=True, exist_ok=True)
    dense = {name: value.contiguous() for name, value in state.items()}
    match layout:
        case "file":
            save_file(dense, folder / "model.safetensors")
        case "bin":
            torch.save(state, folder / "pytorch_model.bin")
        case "pt":
            torch.save({"epoch": 3, "state_dict": state}, folder / "model.pt")
        case "shards":
            names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
            _write_shards(folder / "model.safetensors.index.json", dense, names, save_file)
        case "bin-shards":
            names = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)]
            _write_shards(folder / "pytorch_model.bin.index.json", dense, names, torch.save)
        case _:
            raise ValueError(layout)


def _write_shards(index: Path, state: State, names: list[str], save: Callable[[State, Path], None]) -> None:
    where = {key: names[number % len(names)] for number, key in enumerate(state)}
    for name in names:
        save({key: value for key, value in state.items() if where[key] == name}, index.parent / name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in dtype, shape and every bit: -0 is not 0, and NaN is itself."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.contiguous().view(-1).view(torch.uint8).equal(right.contiguous().view(-1).view(torch.uint8))
    )


def assert_same_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every tensor of both, bit by bit."""
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []
