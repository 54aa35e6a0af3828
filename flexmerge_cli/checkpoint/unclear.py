"""Why a folder has no weights that could be taken, and what to give instead. Names in, an error out; no I/O."""

from collections.abc import Sequence

from flexmerge_cli.checkpoint.choose import WEIGHT_FILES, variants, weight_files
from flexmerge_cli.errors import FlexmergeError, SourceError, UsageError

PIPELINE = "model_index.json"  # of diffusers: models in folders of their own


def no_weights(
    source: str, where: str, files: Sequence[str], folders: Sequence[str], variant: str | None
) -> FlexmergeError:
    """source: as it is to be written. where: for the message. UsageError where there is a choice, else SourceError."""
    found = variants(files)
    if found and variant is not None:
        return SourceError(
            f"no weights of variant `{variant}` in {where}, and no plain ones: there are {', '.join(found)}",
            hint=f"--variant {next(iter(found))}",
        )
    if found:
        return UsageError(
            f"{where} holds weights in {len(found)} variants ({', '.join(found)}), and no plain ones",
            hint=f"say which: --variant {next(iter(found))}",
        )
    if PIPELINE in files:
        inside = ", ".join(folders) or "folders of it"
        return UsageError(
            f"{where} is a pipeline of diffusers, and its models lie in {inside}",
            hint=f"give one of them: {inner(source, next(iter(folders), 'unet'))}",
        )
    several = [name for name in weight_files(files) if "adapter" not in name]
    if len(several) > 1:
        more = ", …" if len(several) > 5 else ""
        return UsageError(
            f"{where} holds {len(several)} weight files: {', '.join(several[:5])}{more}; which of them is the model "
            "is not to be seen",
            hint=f"name it: {inner(source, several[0])}",
        )
    return SourceError(
        f"no checkpoint in {where}: none of {', '.join(WEIGHT_FILES[:5])} there",
        hint="give the folder that holds the weights",
    )


def inner(source: str, name: str) -> str:
    """The source string of what lies in another."""
    if not source.startswith("hf://"):
        return f"{source.rstrip('/')}/{name}"
    return f"{source.rstrip('/')}/{name}" if ":" in source.removeprefix("hf://") else f"{source}:{name}"
