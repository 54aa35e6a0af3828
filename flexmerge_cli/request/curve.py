"""The request of `curve`, parsed and checked once: methods at sizes, and an argument to be tuned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.registry import all_methods, split_call
from flexmerge_cli.request.choices import Auto, Clusters, Cut
from flexmerge_cli.request.merge import MergeRequest, merge_request
from flexmerge_cli.request.size import Size

MAX_VALUES = 100
UNREAD_BY_AUTO = ("steps", "calibrate", "fit", "cluster", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveMethod:
    """A method of a curve."""

    name: str
    """The method as requested."""
    request: MergeRequest
    """The request without a size; clusters need a size, and have an arbitrary one."""

    @property
    def stores_per_task(self) -> bool:
        """Whether it stores something per task beside what a group shares, so that it has a size of its own."""
        return isinstance(self.request.choice, Cut) and self.request.choice.use.stores_per_task


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveRequest:
    """What `curve` is to do."""

    methods: tuple[CurveMethod, ...]
    sizes: tuple[Size, ...] = ()
    """Empty: each method at its own size."""
    relocate: Mapping[str, str] = field(default_factory=dict)
    """Maps the prefix of a source in the plan to its new place."""
    access: Access = ONLINE
    reuse: bool = True
    alternatives: bool = True
    ensembles: bool = False
    """Whether ensembles of the fine-tuned models are scored, where several have the same labels."""
    plane: tuple[str, str] | None = None
    """Two tasks that are scored on the plane through the base and their fine-tuned models."""
    parallel: int = 1
    device: str = "auto"
    threads: int | None = None
    max_memory: int | None = None
    """Bytes of anonymous memory for all processes, beyond what Python and torch take."""

    @property
    def alone(self) -> "CurveRequest":
        """The request for points alone, which values are chosen by."""
        return replace(self, ensembles=False, plane=None)

    def __post_init__(self) -> None:
        """Raise UsageError for a size that a method cannot have."""
        for method in self.methods:
            for size in self.sizes or (None,):
                method.request.at(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tune:
    """An argument, and the variants of it to try for each method."""

    name: str
    variants: Mapping[str, Mapping[str, CurveMethod]]
    """Maps each method that takes the argument to its values, and each value to the method with that value."""


def parse_plane(text: str) -> tuple[str, str]:
    """Parse `A,B`. Raises UsageError unless these are two different names."""
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise UsageError(f"--plane `{text}` is not two tasks", hint="--plane digit,parity")
    return names[0], names[1]


def curve_methods(asked: str | Sequence[str], *, has_statistics: bool, **common: Any) -> tuple[CurveMethod, ...]:
    """Make the methods of a curve from one or several texts; `all` is every method.

    has_statistics: whether the plan has what `auto` needs; if so, `all` includes it. common: words of `merge_request`
    for every method; `auto` beside other methods leaves those that it does not read to them. Raises UsageError.
    """
    names: list[str] = []
    for item in [asked] if isinstance(asked, str) else asked:
        if item == "all":
            given = common.get("calibration") is not None
            names += ["auto"] if has_statistics else []
            names += [name for name, method in all_methods().items() if given or not method.reads]
        else:
            names.append(item.strip())
    if not names:
        raise UsageError("no method is named", hint="--method auto --method low_bit:bits=2")
    for_auto = {key: value for key, value in common.items() if key not in UNREAD_BY_AUTO}
    autos = [name for name in names if split_call(name)[0] == "auto"]
    if len(autos) == len(names):
        for_auto = common
    found = tuple(_curve_method(name, for_auto if name in autos else common) for name in dict.fromkeys(names))
    if common.get("calibration") is not None and not any(method.request.calibration for method in found):
        raise UsageError(
            "--calibration has no effect here: no method reads it",
            hint="--method auto, regmean or fisher; or leave it out",
        )
    return found


def parse_tune(text: str, methods: Sequence[CurveMethod], **common: Any) -> Tune:
    """Parse `scale=0.5:2.5:0.25`, which includes both ends, or `scale=1,1.5,2`.

    Methods that do not take the argument, or set it themselves, have no variants. Raises UsageError if none has any.
    """
    name, values = _tuned(text)
    variants: dict[str, dict[str, CurveMethod]] = {}
    for method in methods:
        choice = method.request.choice
        if not isinstance(choice, Cut | Clusters) or name not in choice.use.call.method.parameters:
            continue
        if name in split_call(method.name)[1]:
            continue
        join = "," if ":" in method.name else ":"
        variants[method.name] = {value: _curve_method(f"{method.name}{join}{name}={value}", common) for value in values}
    if not variants:
        raise UsageError(
            f"no requested method takes `{name}`, or all of them set it already", hint="flexmerge methods NAME"
        )
    return Tune(name=name, variants=variants)


def _curve_method(name: str, common: Mapping[str, Any]) -> CurveMethod:
    needs_size = any(common.get(word) is not None for word in ("fit", "cluster"))
    words = {key: value for key, value in common.items() if key != "calibration"}
    request = merge_request(method=name, size="1x" if needs_size else None, run_files=True, **words)
    if request.reads or isinstance(request.choice, Auto):
        request = replace(request, calibration=common.get("calibration"))
        request.require_calibration()
    return CurveMethod(name=name, request=request if isinstance(request.choice, Clusters) else request.at(None))


def _tuned(text: str) -> tuple[str, tuple[str, ...]]:
    name, equals, rest = text.partition("=")
    hint = "--tune scale=0.5:2.5:0.25, or scale=1,1.5,2"
    if not equals or not name.strip() or not rest.strip():
        raise UsageError(f"--tune `{text}` is not ARGUMENT=VALUES", hint=hint)
    if ":" not in rest:
        values = tuple(dict.fromkeys(value.strip() for value in rest.split(",") if value.strip()))
    else:
        try:
            first, last, step = (Decimal(end.strip()) for end in rest.split(":"))
        except (ValueError, InvalidOperation):
            raise UsageError(f"--tune `{text}`: `{rest}` is not a range", hint=hint) from None
        if not all(number.is_finite() for number in (first, last, step)) or step <= 0 or last < first:
            raise UsageError(f"--tune `{text}`: `{rest}` is not a range", hint=hint)
        count = int((last - first) / step) + 1
        values = tuple(f"{first + number * step:f}" for number in range(min(count, MAX_VALUES + 1)))
    if not 2 <= len(values) <= MAX_VALUES:
        raise UsageError(f"--tune `{text}` has {len(values)} values", hint=f"give between 2 and {MAX_VALUES}")
    return name.strip(), values
