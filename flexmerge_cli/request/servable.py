"""Defines `lora:rank=…`: what engines can serve that hold one base and an adapter per task."""

from typing import Annotated

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.method import Range, method
from flexmerge_cli.methods.registry import make_call, split_call

MOST_RANK = 512
"""The largest rank that vLLM serves."""


@method(paper="", scope="element")
def lora(*, rank: Annotated[int, Range(least=1, most=MOST_RANK)] = 64) -> int:
    """Return the largest rank of an adapter."""
    return rank


def parse_servable(text: str) -> tuple[str, int]:
    """Parse `lora[:rank=N]` to the text with its argument, and the rank. Raises UsageError."""
    name, args = split_call(text)
    if name != "lora":
        raise UsageError(f"--servable {text} is not known", hint="write --servable lora:rank=64")
    try:
        call = make_call(lora, args)
    except UsageError as error:
        raise UsageError(f"--servable {text}: {error.message}", hint="write --servable lora:rank=64") from None
    return call.text, call.args["rank"]
