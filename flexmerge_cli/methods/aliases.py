"""Defines short names for methods with many arguments, and maps mergekit's names to methods here. Needs no torch.

mergekit's methods are methods here with other defaults, or after a step. They still differ in detail: see the
docstrings of ties, breadcrumbs, della, sce and model_stock.
"""

from typing import NamedTuple


class Alias(NamedTuple):
    """The method to use here instead of one of mergekit's."""

    method: str
    """The method, as `NAME[:key=value,…]`."""
    steps: tuple[str, ...]
    """The steps before it, in the same notation and in order."""
    message: str
    """The replacement as command-line options, and what happens to the arguments of mergekit's method."""


_CODED_MEAN = "gain=norm,centre=average,centre_bits=8,scales=bfloat16,clip=search"

# An average in 8 bits, and per task a residual of the given number of bits per weight.
PRESETS = {
    "residual-1bit": f"low_bit:bits=1,{_CODED_MEAN}",
    "residual-2bit": f"low_bit:bits=2,{_CODED_MEAN}",
}

_SUM = "task_arithmetic:form=sum,scale=1.0"
_ELECT = "ties:K=1.0,merge=sum"

# mergekit's defaults: weights are normalised only in linear, ties and della; density is 1, so it is always given.
ALIASES = {
    "linear": ("average", (), "with weights: weighted_average"),
    "task_arithmetic": (_SUM, (), "equal weights become scale"),
    "ties": ("ties:K=1.0,scope=tensor", (), "density becomes K"),
    "dare_linear": (_SUM, ("dare:rescale=l1",), "density d becomes dare:p=1-d,rescale=l1"),
    "dare_ties": (_ELECT, ("dare:rescale=l1",), "density d becomes dare:p=1-d,rescale=l1"),
    "breadcrumbs": ("breadcrumbs:gamma=0.01,scale=1.0", (), "density becomes beta"),
    "breadcrumbs_ties": (_ELECT, ("breadcrumbs:gamma=0.01",), "density becomes beta"),
    "della": ("della:rescale=l1", (), "density d becomes p=1-d, epsilon e becomes window=2e, lambda becomes scale"),
    "della_linear": (
        _SUM,
        ("magprune:rescale=l1",),
        "density d becomes magprune:p=1-d,rescale=l1, epsilon e becomes window=2e",
    ),
    "model_stock": ("model_stock", (), "filter_wise becomes scope=row"),
    "sce": ("sce:density=1.0", (), "select_topk becomes density"),
}


def resolve_alias(name: str) -> Alias | None:
    """Return a preset, the counterpart of mergekit's method of this name, or None. Case and `-` do not matter."""
    key = name.lower().replace("-", "_")
    preset = key.replace("_", "-")
    if preset in PRESETS:
        return Alias(PRESETS[preset], (), f"`{preset}` is `--method {PRESETS[preset]}`")
    if key not in ALIASES:
        return None
    method, steps, note = ALIASES[key]
    options = " ".join([f"--method {method}", *(f"--step {step}" for step in steps)])
    return Alias(method, steps, f"mergekit's `{key}` is `{options}` here; {note}")
