"""The request of `merge`, parsed and checked once. The command line, recipes and Python give the same words to
`merge_request`, and get the same objects and the same errors; below this package nobody parses a word.

Each choice holds the fields that it reads and no others: an option that the choice would not read is an error.
"""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum

from flexmerge_cli.checkpoint.dtypes import CASTS
from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.coded import declare
from flexmerge_cli.methods.method import Statistic
from flexmerge_cli.methods.registry import format_call, resolve
from flexmerge_cli.methods.use import MethodUse, parse_use
from flexmerge_cli.request.auto_options import parse_auto
from flexmerge_cli.request.choices import Auto, BlockMethod, Choice, Cluster, Clusters, Cut, Exact, Fit, Servable
from flexmerge_cli.request.plan import require_seed, require_text
from flexmerge_cli.request.servable import parse_servable
from flexmerge_cli.request.size import Size, parse_size

KEEP = "keep"
"""Written in place of a method for blocks whose tasks stay apart."""


class Layout(StrEnum):
    """How the folder of a task that needs no decoding holds its weights."""

    LINKS = "links"
    """Links to the files that store them."""
    POINTER = "pointer"
    """An index that names these files, for places that have no links."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """What a bundle is to hold. `merge_request` makes it."""

    choice: Choice = field(default_factory=Exact)
    dtype: str | None = None
    """`F32`, `F16` or `BF16`, to which floating tensors are cast; None keeps their dtypes."""
    max_distance: float | None = None
    """Every task must end up nearer to its model than this; at least 0."""
    layout: Layout = Layout.LINKS
    calibration: str | None = field(default=None, compare=False)
    """Where the calibration is that a method reads, as it was typed."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Messages that say which methods stand in for those of mergekit."""

    @property
    def size(self) -> Size | None:
        return getattr(self.choice, "size", None)

    @property
    def method(self) -> str | None:
        """The main method, without the arguments that are at their defaults."""
        if isinstance(self.choice, Auto):
            return self.choice.text
        return self.choice.use.call.short if isinstance(self.choice, Cut | Clusters) else None

    @property
    def uses(self) -> tuple[MethodUse, ...]:
        """Every method that was asked for by name, the main one first."""
        main = (self.choice.use,) if isinstance(self.choice, Cut | Clusters) else ()
        others = self.choice.block_methods if isinstance(self.choice, Cut | Auto) else ()
        return (*main, *(item.use for item in others if item.use is not None))

    @property
    def reads(self) -> set[str]:
        """The statistics of a calibration that its methods must have; `auto` takes what there is."""
        return {use.reads for use in self.uses} - {""}

    def require_calibration(self) -> None:
        """Raise UsageError if a method reads a calibration, and none is given."""
        names = [use.name for use in self.uses if use.reads]
        if names and self.calibration is None:
            raise UsageError(
                f"`{names[0]}` needs what `calibrate` measures of each task, and no --calibration is given",
                hint="flexmerge calibrate plan.json --spec calib.yaml -o calibration/, then --calibration calibration/",
            )

    def at(self, size: Size | None) -> "MergeRequest":
        """Return the request with another size, one of --sizes. Raises UsageError for a fractional number of
        clusters."""
        if isinstance(self.choice, Clusters):
            return replace(self, choice=replace(self.choice, size=_whole(size, "--sizes")))
        assert isinstance(self.choice, Cut | Auto | Servable)
        return replace(self, choice=replace(self.choice, size=size))

    def words(self) -> list[str]:
        """Return the options of `flexmerge merge` that ask for the same, without arguments at their defaults."""
        choice, found = self.choice, list[tuple[str, object]]()
        if isinstance(choice, Auto):
            found.append(("--method", choice.text))
        elif isinstance(choice, Cut | Clusters):
            # An alias is written out, unless its steps would then go before the methods of other blocks, too.
            alone = len(self.uses) == 1 or not choice.use.num_own_steps
            found += [("--method", choice.use.call.short if alone else choice.use.name)]
            found += [("--step", step.short) for step in (choice.use.steps if alone else choice.use.asked_steps)]
            found += [("--calibrate", choice.use.calibrate and choice.use.calibrate.short)]
        if isinstance(choice, Cut | Auto):
            found += [
                ("--method-for", f"{item.pattern}={KEEP if item.use is None else item.use.name}")
                for item in choice.block_methods
            ]
        if isinstance(choice, Servable):
            found.append(("--servable", choice.text))
        found.append(("--size", self.size and self.size.text))
        if isinstance(choice, Cut):
            found += [("--merges", choice.merges), ("--fit", None if choice.fit is Fit.TIGHT else choice.fit.value)]
        if isinstance(choice, Clusters):
            found += [("--cluster", choice.cluster.value), ("--seed", choice.seed or None)]
        found.append(("--dtype", next((word for word, dtype in CASTS.items() if dtype == self.dtype), None)))
        found.append(("--max-distance", self.max_distance))
        found.append(("--calibration", self.calibration))
        found.append(("--layout", None if self.layout is Layout.LINKS else self.layout.value))
        return [str(word) for option, value in found if value is not None for word in (option, value)]


def typed(request: MergeRequest) -> str:
    """Return the options that decide what is stored, as one would type them; the calibration is left out."""
    return shlex.join(replace(request, calibration=None, max_distance=None, layout=Layout.LINKS).words())


class MethodMissing(UsageError):
    """A size is given without a method: the user must choose what is lost."""


# Maps each option to why a choice of this kind does not read it.
WITHOUT_METHOD = "merges nothing unless a method is named", "add --method NAME, or leave {option} out"
UNREAD: dict[object, tuple[set[str], tuple[str, str]]] = {
    Exact: ({"steps", "calibrate", "method_for", "fit", "cluster", "seed"}, WITHOUT_METHOD),
    Auto: (
        {"steps", "calibrate", "merges", "fit", "cluster", "seed"},
        ("chooses by itself, and follows no merge order", "leave {option} out, or name another method"),
    ),
    Clusters: (
        {"method_for", "merges", "fit"},
        ("groups every tensor by itself, and cuts no merge order", "leave {option} out, or leave out --cluster"),
    ),
    Servable: (
        {"steps", "calibrate", "method_for", "merges", "fit", "cluster", "seed"},
        ("chooses its own methods", "leave {option} out, or leave out --servable"),
    ),
    Cut: ({"seed"}, ("draws nothing", "add --cluster channels, or leave {option} out")),
}
NAMES: dict[object, str] = {
    Exact: "a merge without --method",
    Auto: "--method auto",
    Clusters: "--cluster",
    Servable: "--servable",
    Cut: "cutting a merge order",
}


def merge_request(
    *,
    method: str | None = None,
    steps: Sequence[str] | None = None,
    calibrate: str | None = None,
    method_for: Mapping[str, str] | Iterable[str] | None = None,
    size: str | None = None,
    merges: int | None = None,
    fit: str | None = None,
    cluster: str | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    max_distance: float | None = None,
    layout: str | None = None,
    calibration: str | None = None,
    servable: str | None = None,
    run_files: bool = False,
) -> MergeRequest:
    """Parse the words of a request; None means not given. Reads no plan or weight, and runs a method's file at most
    once.

    method, steps, calibrate: `NAME[:key=value,…]`; method may be `auto`. method_for: maps a pattern to a method or
    `keep`; or texts PATTERN=METHOD. size: `2.25x`, `40%` or `600MiB`. fit: `tight` or `prefix`. cluster: `channels`.
    dtype: `bf16`, `fp16` or `fp32`. max_distance: at least 0. layout: `links` or `pointer`. calibration: the folder
    that `calibrate` wrote; `require_calibration` checks that it is given. servable: `lora:rank=64`. run_files:
    whether a method may come from `./FILE.py#NAME`, which is code that runs; never for words of a stranger's file.

    Raises UsageError for unknown words, for options that contradict each other, and for every option that would not be
    read; MethodMissing for a size without a method.
    """
    given = _Words(
        steps=tuple(steps or ()),
        calibrate=calibrate,
        method_for=_by_block(method_for),
        merges=merges,
        fit=fit,
        cluster=cluster,
        seed=seed,
        servable=servable,
    )
    require_text("method-for", *(pattern for pattern, _ in given.method_for))
    texts = [text for text in (method, *(text for _, text in given.method_for)) if text not in (None, KEEP)]
    notes = tuple(dict.fromkeys(note for text in texts if text and (note := resolve(text).message)))
    choice = _choice(method, size, given, run_files)
    if max_distance is not None and not 0 <= max_distance < math.inf:
        raise UsageError(f"--max-distance {max_distance} is not a number of 0 or more", hint="write 0.5")
    cast = CASTS[_word(CASTS, dtype, "dtype")] if dtype is not None else None
    folders = Layout(_word(Layout, layout, "layout")) if layout is not None else Layout.LINKS
    request = MergeRequest(
        choice=choice, dtype=cast, max_distance=max_distance, layout=folders, calibration=calibration, notes=notes
    )
    if calibration is not None and not request.reads and not isinstance(choice, Auto):
        raise UsageError(
            "--calibration has no effect here: no method reads it",
            hint="--method auto, regmean or fisher; or leave it out",
        )
    return request


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """Options that some choices do not read."""

    steps: tuple[str, ...]
    calibrate: str | None
    method_for: tuple[tuple[str, str], ...]
    merges: int | None
    fit: str | None
    cluster: str | None
    seed: int | None
    servable: str | None


def _choice(method: str | None, size: str | None, given: _Words, run_files: bool) -> Choice:
    wanted = parse_size(size) if size is not None else None
    auto = parse_auto(method) if method is not None else None
    kind: type[Choice] = Cut if given.cluster is None else Clusters
    kind = Exact if method is None else Auto if auto is not None else kind
    kind = kind if given.servable is None else Servable
    _refuse_unread(kind, given)
    if given.servable is not None:
        if method is not None:
            raise UsageError("--servable chooses its own methods", hint="leave out --method, or leave out --servable")
        text, rank = parse_servable(given.servable)
        return Servable(text=text, rank=rank, size=wanted)
    if method is None:
        if wanted is not None or given.merges is not None:
            raise MethodMissing(
                "a size is given without a method: choose by name what is lost",
                hint="add --method NAME, or --method auto, which chooses by itself; `flexmerge methods` lists them",
            )
        return Exact()
    block_methods = tuple(
        BlockMethod(pattern=pattern, use=None if text == KEEP else _use(text, given, run_files))
        for pattern, text in given.method_for
    )
    if auto is not None:
        text, limits = auto
        return Auto(text=text, limits=limits, block_methods=block_methods, size=wanted)
    use = _use(method, given, run_files)
    if given.cluster is not None:
        return _clusters(use, wanted, given)
    if wanted is not None and given.merges is not None:
        raise UsageError("--size and --merges cannot be combined", hint="leave one of them out")
    if given.fit is not None and wanted is None:
        raise UsageError("--fit requires a size", hint="add --size 2x, or leave --fit out")
    if given.merges is not None and given.merges < 0:
        raise UsageError(f"--merges {given.merges} is negative", hint="give 0 or more")
    fit = Fit(_word(Fit, given.fit, "fit")) if given.fit is not None else Fit.TIGHT
    return Cut(use=use, block_methods=block_methods, size=wanted, merges=given.merges, fit=fit)


def _refuse_unread(kind: type[Choice], given: _Words) -> None:
    """Raise UsageError for every option that this choice would not read, whatever its value is."""
    names, (why, hint) = UNREAD[kind]
    for name in (one.name for one in fields(given) if one.name in names):
        if getattr(given, name) not in (None, ()):
            option = "--step" if name == "steps" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} has no effect here: {NAMES[kind]} {why}", hint=hint.format(option=option))


def _clusters(use: MethodUse, size: Size | None, given: _Words) -> Clusters:
    cluster = Cluster(_word(Cluster, str(given.cluster), "cluster", CLUSTER_HINT))
    require_tensor_scope(use.call)
    require_seed(given.seed or 0)
    return Clusters(use=use, cluster=cluster, size=_whole(size, "--size"), seed=given.seed or 0)


def _whole(size: Size | None, option: str) -> Size:
    """Return the size, whose value is the number of clusters. Raises UsageError with the option that gives it."""
    if size is None or not size.is_whole:
        found = f"{option} {size.text} is not one" if size else f"no {option} is given"
        hint = f"write {option} 2x, or {option} 3x"
        raise UsageError(f"--cluster makes a whole number of models, but {found}", hint=hint)
    return size


CLUSTER_HINT = "one of: channels; for whole models: flexmerge plan PLAN --blocks model --linkage average -o OTHER"


def require_tensor_scope(call: Call) -> None:
    """Raise UsageError for a method that must see more than one tensor: each tensor has clusters of its own."""
    coded = declare(call)
    made_by = coded.centre_call() if coded else call
    statistics: list[Statistic | None] = [made_by.statistics if made_by else None]
    statistics += [coded.expert] if coded and isinstance(coded.expert, Statistic) else []
    scopes = {statistic.scope for statistic in statistics if statistic} | ({made_by.scope} if made_by else set())
    wide = sorted(scopes & {"block", "model"})
    if wide:
        parameters = call.method.parameters
        narrow = {name: "tensor" for name, p in parameters.items() if "tensor" in p.choices and call.args[name] in wide}
        changed = {name: value for name, value in call.args.items() if value != parameters[name].default}
        raise UsageError(
            f"`{call.method.name}` needs a whole {wide[0]}, but --cluster groups every tensor separately",
            hint=f"--method {format_call(call.method.name, changed | narrow)}"
            if narrow
            else "take a method that needs no more than a tensor: --method task_arithmetic",
        )


def _use(text: str, given: _Words, run_files: bool) -> MethodUse:
    return parse_use(text, steps=given.steps, calibrate=given.calibrate, run_files=run_files)


def _by_block(items: Mapping[str, str] | Iterable[str] | None) -> tuple[tuple[str, str], ...]:
    if isinstance(items, Mapping):
        return tuple(items.items())
    pairs = []
    for item in items or ():
        pattern, equals, text = item.partition("=")
        if not equals or not pattern or not text:
            raise UsageError(f"`{item}` is not PATTERN=METHOD", hint="--method-for '*.self_attn=ties:K=0.2'")
        pairs.append((pattern, text))
    return tuple(pairs)


def _word(known: Iterable[str], word: str, option: str, hint: str | None = None) -> str:
    if word not in list(known):
        raise UsageError(f"--{option} {word} is not known", hint=hint or f"one of: {', '.join(known)}")
    return word
