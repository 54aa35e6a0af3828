"""The model that an adapter and its base make: the base's tensors, some of them changed on reading.

Modules are found by name, under the prefix of whole segments (on either side) and the spelling under which most are
there. Headers only.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from flexmerge_cli.checkpoint.change import Change, LowRank, Scaled
from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.dtypes import FLOATING
from flexmerge_cli.checkpoint.peft import BY_HAND, CONFIG_NAME, Adapter, AdapterKind, Factors
from flexmerge_cli.checkpoint.place import is_hub
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError

# What transformers 5 calls modules that its files call otherwise: (in the model, in the file), whole segments.
# Source: transformers 5.24, conversion_mapping.py, of ViT, DeiT, BEiT, AST …, and of DINOv2.
SPELLINGS: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    (
        ("layers", "encoder.layer"), ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
    ),
    (
        ("attention.q_proj", "attention.attention.query"), ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"), ("attention.o_proj", "attention.output.dense"),
    ),
)  # fmt: skip
MAX_PREFIX_SEGMENTS = 4


@dataclass(frozen=True, slots=True)
class _Naming:
    """How a name in the adapter maps to a name in the base."""

    spelling: tuple[tuple[str, str], ...] = ()
    dropped: str = ""
    """The prefix that only the adapter's names have; ends in a dot, or is empty."""
    added: str = ""

    def in_base(self, name: str) -> str:
        return self.added + self.spelled(name).removeprefix(self.dropped)

    def spelled(self, name: str) -> str:
        dotted = f".{name}."
        for model, file in self.spelling:
            dotted = dotted.replace(f".{model}.", f".{file}.")
        return dotted[1:-1]


def adapted(adapter: Adapter, base: Checkpoint) -> Checkpoint:
    """The model of an adapter on its base, as `merge_and_unload` would make it, with the tensor names of a fine-tune.

    Raises DataError with every module that the base has not, or has in another form.
    """
    naming = _naming(adapter, base)
    changes: dict[str, Change] = {}
    problems: list[str] = []
    own = {}
    for name, tensor in adapter.own.items():
        inside = naming.in_base(name)
        own[inside if inside in base.tensors else naming.spelled(name)] = tensor
    sources = base.tensors | own
    for module in (*adapter.factors, *adapter.vectors):
        name = f"{naming.in_base(module)}.weight"
        weight = sources.get(name)
        change: Change | None = None
        if weight is None:
            tied = name.endswith("lm_head.weight") and base.config.get("tie_word_embeddings", True)
            problems.append(f"`{name}` is missing" + (": it is tied to the embedding" if tied else ""))
        elif weight.dtype not in FLOATING:
            problems.append(f"`{name}` is {weight.dtype}, which is not a floating-point type")
        elif adapter.kind is AdapterKind.LORA:
            change = _low_rank(adapter, adapter.factors[module], weight)
        else:
            change = _scaled(adapter, module, adapter.vectors[module], weight)
            bias = sources.get(f"{naming.in_base(module)}.bias")
            if bias is not None and not _is_feedforward(adapter, module, weight):
                changes[f"{naming.in_base(module)}.bias"] = Scaled(vector=_row(adapter.vectors[module]), axis=0)
        if change is not None:
            changes[name] = change
        elif weight is not None and weight.dtype in FLOATING:
            problems.append(
                f"`{name}` is {list(weight.shape)}, which the adapter's {_forms(adapter, module)} do not fit"
            )
    if problems:
        raise DataError(
            f"{adapter.checkpoint.path} does not fit the base {base.path}:\n  " + "\n  ".join(problems[:20]),
            hint="use the base it was trained on, or " + BY_HAND,
        )
    tensors = {}
    for name, tensor in sources.items():
        outer = name if name in own and name not in base.tensors else naming.dropped + name
        tensors[outer] = replace(tensor, name=outer, change=changes.get(name))
    side = {name: path for name, path in base.side_files.items() if name != "README.md"}
    side |= {
        name: path for name, path in adapter.checkpoint.side_files.items() if name not in (CONFIG_NAME, "README.md")
    }
    saved = {naming.dropped + naming.in_base(name) for name in adapter.own if adapter.is_saved(name)}
    saved |= {naming.spelled(name) for name in adapter.own if adapter.is_saved(name)}
    return replace(
        adapter.checkpoint,
        tensors=tensors,
        weight_bytes=base.weight_bytes | adapter.checkpoint.weight_bytes,
        config=base.config,
        side_files=dict(sorted(side.items())),
        private=frozenset(saved & set(tensors)),
        adapter=adapter.kind.value,
    )


def names_other_base(adapter: Adapter, base: Checkpoint) -> str | None:
    """The base that the adapter names, or None if it is this one.

    One that names none fits. Equal are: one folder; one id on the Hub, whichever revision; an id, and a folder that is
    of its Hub cache, whose config gives it as its name, or that is called like it; and a path that is not on this
    machine and ends like the base's.
    """
    named = adapter.base_name
    if named is None:
        return None
    source = base.source
    hub = source.split("://", 1)[1].split("@")[0].split(":")[0] if is_hub(source) else None
    if named.removeprefix("hf://") == hub:
        return None
    for start in (Path(), adapter.checkpoint.path):
        place = start / Path(named)
        if hub is None and _exists(place):
            return None if place.resolve() == base.path.resolve() else named
    last = named.rstrip("/").replace("\\", "/").rpartition("/")[2].lower()
    names = {base.path.name.lower(), base.path.resolve().name.lower()}
    cached = "models--" + named.replace("/", "--")
    same = hub is None and (last in names or cached in base.path.parts or base.config.get("_name_or_path") == named)
    return None if same else named


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or not a valid file name
        return False


def _naming(adapter: Adapter, base: Checkpoint) -> _Naming:
    """The spelling and prefix under which most modules are in the base; ties: first spelling, shortest prefix."""
    modules = [*adapter.factors, *adapter.vectors]
    best, most = _Naming(), -1
    for spelling in SPELLINGS:
        plain = _Naming(spelling)
        first = f"{plain.spelled(modules[0])}.weight"
        segments = first.split(".")
        cuts = range(min(MAX_PREFIX_SEGMENTS, len(segments) - 2) + 1)
        tries = [_Naming(spelling, "".join(f"{s}." for s in segments[:cut])) for cut in cuts]
        tries += [
            _Naming(spelling, "", name.removesuffix(first))
            for name in sorted(base.tensors, key=len)
            if name.endswith(f".{first}")
        ][:8]
        for naming in tries:
            found = sum(f"{naming.in_base(module)}.weight" in base.tensors for module in modules)
            if found > most:
                best, most = naming, found
    return best


def _low_rank(adapter: Adapter, factors: Factors, weight: StoredTensor) -> LowRank | None:
    """None if the factors do not make a tensor of this shape."""
    a, b = _flat(factors.a, factors.a.shape[0]), _flat(factors.b, factors.b.shape[0])
    shape = (weight.shape[0], math.prod(weight.shape[1:])) if weight.shape else (0, 0)
    plain, turned = (b.shape[0], a.shape[1]) == shape, (a.shape[1], b.shape[0]) == shape
    if turned and (factors.is_embedding or not plain or adapter.transposed) and len(weight.shape) == 2:
        return LowRank(left=_transposed(a), right=_transposed(b), scale=factors.scale)
    if not plain or factors.is_embedding:
        return None
    return LowRank(left=b, right=a, scale=factors.scale)


def _scaled(adapter: Adapter, module: str, vector: StoredTensor, weight: StoredTensor) -> Scaled | None:
    length = math.prod(vector.shape)
    if len(weight.shape) < 2 or vector.dtype not in FLOATING:
        return None
    incoming = _is_feedforward(adapter, module, weight)
    is_turned = len(weight.shape) == 2 and weight.shape[0 if not incoming else 1] != length
    is_turned = is_turned or (adapter.transposed and len(weight.shape) == 2 and weight.shape[0] == weight.shape[1])
    axis = int(incoming) ^ int(is_turned)
    return Scaled(vector=_row(vector), axis=axis) if weight.shape[axis] == length else None


def _is_feedforward(adapter: Adapter, module: str, weight: StoredTensor) -> bool:
    """Whether the vector scales the input: [1, in] of a linear layer, not [out, 1]; if both fit, the config decides."""
    vector = adapter.vectors[module]
    if len(weight.shape) == 2 and len(vector.shape) == 2 and vector.shape[0] != vector.shape[1]:
        return vector.shape[0] == 1
    return any(module.endswith(name) for name in adapter.feedforward)


def _flat(tensor: StoredTensor, rows: int) -> StoredTensor:
    """The tensor as [rows, rest], with the strides of a row-major matrix or its own."""
    shape = (rows, math.prod(tensor.shape) // rows)
    if tensor.strides is None or len(tensor.shape) == 2:
        return replace(tensor, shape=shape)
    raise DataError(f"{tensor.path}: `{tensor.name}` is not row-major", hint="save it as `tensor.contiguous()`")


def _transposed(matrix: StoredTensor) -> StoredTensor:
    rows, columns = matrix.shape
    strides = matrix.strides or (columns, 1)
    return replace(matrix, shape=(columns, rows), strides=(strides[1], strides[0]))


def _row(vector: StoredTensor) -> StoredTensor:
    length = math.prod(vector.shape)
    strides = None if vector.strides is None else (1, max(vector.strides))
    return replace(vector, shape=(1, length), strides=strides)


def _forms(adapter: Adapter, module: str) -> str:
    factors = adapter.factors.get(module)
    found = (factors.a, factors.b) if factors is not None else (adapter.vectors[module],)
    return " and ".join(str(list(tensor.shape)) for tensor in found)
