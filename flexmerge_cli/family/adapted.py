"""Makes the model of an adapter and its base: the base's tensors, some of them changed on reading.

Modules are found by name like the tensors of a fine-tune (align.py), and by the shapes of their factors. Headers only.
"""

import math
from dataclasses import replace
from pathlib import Path

from flexmerge_cli.checkpoint.change import Change, LowRankChange, Scaled
from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.dtypes import FLOATING
from flexmerge_cli.checkpoint.parts import part_of
from flexmerge_cli.checkpoint.peft import BY_HAND, CONFIG_NAME, Adapter, AdapterKind, Factors
from flexmerge_cli.checkpoint.place import is_hub
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError
from flexmerge_cli.family.align import Alignment, align, same_shape
from flexmerge_cli.family.classes import is_output
from flexmerge_cli.family.spelling import model_types


def adapted(adapter: Adapter, base: Checkpoint) -> Checkpoint:
    """Return the model of an adapter on its base, as `merge_and_unload` would make it, with the tensor names of a
    fine-tune.

    Raises DataError that lists every module that the base lacks, or has in another form.
    """
    alignment = _alignment(adapter, base)
    changes: dict[str, Change] = {}
    problems: list[str] = []
    own, saved = {}, set()
    for name, tensor in adapter.own.items():
        inside = alignment.names[name]
        inside = inside if inside in base.tensors else name
        own[inside] = tensor
        saved |= {inside} if adapter.is_saved(name) else set()
    sources = base.tensors | own
    for module in (*adapter.factors, *adapter.vectors):
        name = alignment.names[f"{module}.weight"]
        bias_name = name.removesuffix("weight") + "bias"
        weight = sources.get(name)
        change: Change | None = None
        if weight is None:
            tied = is_output(name) and base.config.get("tie_word_embeddings", True)
            problems.append(f"`{name}` is missing" + (": it is tied to the embedding" if tied else ""))
        elif weight.dtype not in FLOATING:
            problems.append(f"`{name}` is {weight.dtype}, which is not a floating-point type")
        elif adapter.kind is AdapterKind.LORA:
            change = _low_rank(adapter, adapter.factors[module], weight)
        else:
            change = _scaled(adapter, module, adapter.vectors[module], weight)
            if bias_name in sources and not _is_feedforward(adapter, module, weight):
                changes[bias_name] = Scaled(vector=_row(adapter.vectors[module]), axis=0)
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
    # `model.` may wrap a part of the base alone; without it transformers still finds the tensors.
    wrapper = "" if alignment.wrapper == "model." else alignment.wrapper
    inner = [name for name in base.tensors if not part_of(name, base.parts)[0]]
    outer = {name: name for name in sources} | {name: wrapper + name for name in inner}
    tensors = {
        outer[name]: replace(tensor, name=outer[name], change=changes.get(name)) for name, tensor in sources.items()
    }
    side = {name: path for name, path in base.side_files.items() if name != "README.md"}
    side |= {
        name: path for name, path in adapter.checkpoint.side_files.items() if name not in (CONFIG_NAME, "README.md")
    }
    return replace(
        adapter.checkpoint,
        tensors=tensors,
        weight_bytes=base.weight_bytes | adapter.checkpoint.weight_bytes,
        config=base.config,
        side_files=dict(sorted(side.items())),
        parts=base.parts,
        private=frozenset(outer[name] for name in saved),
        adapter=adapter.kind.value,
    )


def names_other_base(adapter: Adapter, base: Checkpoint) -> str | None:
    """Return the base that the adapter names, or None if it is this one.

    An adapter that names no base fits any. Equal are: one folder; one id on the Hub, whatever the revision; an id and a
    folder of its Hub cache, or whose config gives the id as its name, or that is named like it; and a path that is not
    on this machine and ends like the base's.
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


def _alignment(adapter: Adapter, base: Checkpoint) -> Alignment:
    """Find the names of the adapter's parameters, and of its modules' weights, in the base. Raises DataError if
    unclear."""
    parts: dict[str, StoredTensor | Factors] = {f"{module}.weight": found for module, found in adapter.factors.items()}
    parts |= {f"{module}.weight": vector for module, vector in adapter.vectors.items()}
    own = {name: tensor for name, tensor in adapter.own.items() if name not in parts}

    def fits(part: StoredTensor | Factors, weight: StoredTensor) -> bool:
        if isinstance(part, Factors):
            rows, columns = part.b.shape[0], math.prod(part.a.shape[1:])
            return len(weight.shape) >= 2 and {rows, columns} == {weight.shape[0], math.prod(weight.shape[1:])}
        if part.name in vectors:
            return len(weight.shape) >= 2 and math.prod(part.shape) in weight.shape[:2]
        return same_shape(part, weight)

    vectors = {vector.name for vector in adapter.vectors.values()}
    found = align(
        base.tensors, parts | own, model_types=model_types(base.config), kind=adapter.model_class or "", fits=fits
    )
    if found.unclear:
        possible = "; ".join(map(str, found.unclear[:4]))
        raise DataError(
            f"{adapter.checkpoint.path} fits the base {base.path} in several ways: {possible}",
            hint="give the part of the base that it was trained on as the base, or " + BY_HAND,
        )
    return found


def _low_rank(adapter: Adapter, factors: Factors, weight: StoredTensor) -> LowRankChange | None:
    """Return the change of a weight; None if the factors do not make a tensor of this shape."""
    a, b = _flat(factors.a, factors.a.shape[0]), _flat(factors.b, factors.b.shape[0])
    shape = (weight.shape[0], math.prod(weight.shape[1:])) if weight.shape else (0, 0)
    plain, turned = (b.shape[0], a.shape[1]) == shape, (a.shape[1], b.shape[0]) == shape
    if turned and (factors.is_embedding or not plain or adapter.transposed) and len(weight.shape) == 2:
        return LowRankChange(left=_transposed(a), right=_transposed(b), scale=factors.scale)
    if not plain or factors.is_embedding:
        return None
    return LowRankChange(left=b, right=a, scale=factors.scale)


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
    """Return whether the vector scales the input: [1, in] of a layer, not [out, 1]; if both fit, the config decides."""
    vector = adapter.vectors[module]
    if len(weight.shape) == 2 and len(vector.shape) == 2 and vector.shape[0] != vector.shape[1]:
        return vector.shape[0] == 1
    return any(module.endswith(name) for name in adapter.feedforward)


def _flat(tensor: StoredTensor, rows: int) -> StoredTensor:
    """View the tensor as [rows, rest], with the strides of a row-major matrix or its own."""
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
