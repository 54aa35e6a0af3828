"""Explains why a folder has no usable weights, and what to give instead. From names alone; no I/O."""

from collections.abc import Sequence

from flexmerge_cli.checkpoint.choose import WEIGHT_FILES, variants, weight_files
from flexmerge_cli.checkpoint.contents import COMPOSITES
from flexmerge_cli.checkpoint.foreign import SHARD, of_files, shards
from flexmerge_cli.errors import FlexmergeError, SourceError, UsageError


def no_weights(source: str, where: str, names: Sequence[str], variant: str | None) -> FlexmergeError:
    """Return the error for a folder without usable weights: UsageError if the user can choose some, otherwise
    SourceError.

    source: the source string as the user would write it. where: the folder, as named in the message. names: relative
    paths of its files.
    """
    files = [name for name in names if "/" not in name]
    indices = sorted(set(files) & set(COMPOSITES))
    found = variants([name.rpartition("/")[2] for name in names] if indices else files)
    if found and variant is not None:
        return SourceError(
            f"no weights of variant `{variant}` in {where}, and none without a variant; found: {', '.join(found)}",
            hint=f"--variant {next(iter(found))}",
        )
    if found:
        return UsageError(
            f"{where} holds weights in {len(found)} variants ({', '.join(found)}), and none without a variant",
            hint=f"choose one: --variant {next(iter(found))}",
        )
    if indices:
        return SourceError(
            f"no checkpoint in {where}: it has {indices[0]}, and no subfolder with weights",
            hint="get the whole folder",
        )
    if (found_shards := shards(files)) is not None:
        count, total, first = found_shards
        return SourceError(
            f"{where} holds {count} of the {total} shards of a model, and no index of their tensors",
            hint=f"get the whole folder with its index, such as {index_of(first)}",
        )
    several = [name for name in weight_files(files) if "adapter" not in name]
    if len(several) > 1:
        more = ", …" if len(several) > 5 else ""
        return UsageError(
            f"{where} holds {len(several)} weight files: {', '.join(several[:5])}{more}, and it is "
            "unclear which of them is the model",
            hint=f"name it: {inner(source, several[0])}",
        )
    ends = {part for name in names for part in (name.partition("/")[0], name.rpartition("/")[2]) if part}
    if (known := of_files(sorted(ends))) is not None:
        return SourceError(f"{where} is {known[1].what}: it holds {known[0]}", hint=known[1].hint)
    return SourceError(
        f"no checkpoint in {where}: it has none of {', '.join(WEIGHT_FILES[:5])}",
        hint="give the folder that holds the weights",
    )


def index_of(shard: str) -> str:
    """Return the usual name of the index of a shard: model.safetensors.index.json."""
    match = SHARD.fullmatch(shard)
    return f"{match[1]}.{match[5]}.index.json" if match else "model.safetensors.index.json"


def inner(source: str, name: str) -> str:
    """Return the source string of a file or folder inside another source."""
    if not source.startswith("hf://"):
        return f"{source.rstrip('/')}/{name}"
    return f"{source.rstrip('/')}/{name}" if ":" in source.removeprefix("hf://") else f"{source}:{name}"
