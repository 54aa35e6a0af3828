"""Registers all methods, steps and calibrations by name; parses and writes `NAME[:key=value,…]`.

MODULES lists the modules whose methods are registered. Values are YAML flow: `ties:K=0.2,scope=block`. load.py finds
other methods in installed packages, by name, and in files, as `./my.py#NAME`.
"""

import difflib
import functools
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.absent import explain_absent
from flexmerge_cli.methods.aliases import PRESETS, Alias, resolve_alias
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.coefficients import read_coefficients
from flexmerge_cli.methods.load import method_from_file, method_from_package, packaged_methods
from flexmerge_cli.methods.method import Method, Origin, Parameter
from flexmerge_cli.methods.step import Calibration, CalibrationCall, Step, StepCall
from flexmerge_cli.yaml_file import BoundedLoader, load_bounded

if TYPE_CHECKING:
    from flexmerge_cli.methods.coded import Coded

MAX_WORD = 64  # characters compared with known names; the time of difflib grows with the product of the lengths

Named = TypeVar("Named", Method, Step, Calibration)

# One file per idea; every Method in it is registered under its own name.
MODULES = (
    "linear",
    "model_stock",
    "magmax",
    "ties",
    "breadcrumbs",
    "sce",
    "pcb",
    "dare",
    "della",
    "tsv_m",
    "iso",
    "wudi",
    "swudi",
    "aswudi",
    "opcm",
    "fr",
    "regmean",
    "fisher",
    "svc",
    "emr",
    "tall_masks",
    "consensus",
    "consensus_original",
    "randes",
    "coded",
    "free",
)


@functools.cache
def all_methods() -> Mapping[str, Method]:
    """Map every name to its method, in the order of MODULES."""
    return dict(_named(Method))


@functools.cache
def all_steps() -> Mapping[str, Step]:
    """Map every name to its step, in the same order. A step may have the name of a method."""
    return dict(_named(Step))


@functools.cache
def all_calibrations() -> Mapping[str, Calibration]:
    """Map every name to its calibration, in the same order."""
    return dict(_named(Calibration))


def parse_call(text: str, *, run_files: bool = False, code: bytes | None = None) -> Call:
    """Parse `NAME[:key=value,…]` to a method with all its arguments, defaults included. Raises UsageError.

    run_files: whether `./my.py#NAME` may be run; only if the user typed it, never for text from a bundle or a recipe.
    code: the file's bytes, if they have been read already.
    """
    name, args = split_call(text)
    file, hash_, function = name.rpartition("#")
    if hash_:
        if not run_files:
            raise UsageError(f"`{name}` would run a file", hint="methods from files are allowed only with --method")
        if function in all_methods():
            raise UsageError(f"`{name}` has the name of another method", hint="rename the function")
        return make_call(method_from_file(file, function, code), args, name=name)
    for key, value in args.items():
        if isinstance(value, str) and value.startswith("@"):
            if not run_files:
                raise UsageError(f"`{text}` names a file", hint="files are read only with --method")
            args[key] = read_coefficients(Path(value[1:]))
    method = all_methods().get(name) or method_from_package(name)
    if method is None:
        alias = resolve_alias(name)
        if alias and _same_word(name) not in all_methods():
            raise UsageError(f"no method `{name}`", hint=alias.message)
        if name == "auto":
            raise UsageError("`auto` chooses for the whole bundle, not for some blocks", hint="use --method auto")
        if "," in name and set(name.split(",")) <= {*all_methods(), "auto"}:
            several = " ".join(f"--method {one}" for one in name.split(","))
            raise UsageError(f"no method `{name}`", hint=f"several: {several}")
        raise _unknown("method", name)
    return make_call(method, args)


def resolve(text: str) -> Alias:
    """Resolve `NAME[:key=value,…]` to itself or, for a name of mergekit, to a method here with steps and a message.

    A name of mergekit with arguments is returned unchanged, since they have other meanings there: `parse_call` refuses
    it and says what to use.
    """
    itself = Alias(text, (), "")
    name, args = split_call(text)
    alias = resolve_alias(name)
    if not args and alias is not None and alias.method in PRESETS.values():
        return alias
    if args or any(word in known() for known in (all_methods, packaged_methods) for word in (name, _same_word(name))):
        return itself
    return alias or itself


def parse_step(text: str) -> StepCall:
    """Parse `NAME[:key=value,…]` to a step with all its arguments. Raises UsageError."""
    name, args = split_call(text)
    if name not in all_steps():
        raise _unknown("step", name)
    return make_step(all_steps()[name], args)


def parse_calibrate(text: str) -> CalibrationCall:
    """Parse `NAME[:key=value,…]` to a calibration with all its arguments. Raises UsageError.

    `require_after` of the result checks that it can follow a method.
    """
    name, args = split_call(text)
    if name not in all_calibrations():
        raise _unknown("calibration", name)
    return make_calibration(all_calibrations()[name], args)


def parse_call_again(text: str, origin: Origin | None) -> Call:
    """Recreate a call that another process has parsed, with the bytes of the file that it ran."""
    return parse_call(text, run_files=True, code=origin.code if origin is not None and origin.code else None)


def make_call(method: Method, args: Mapping[str, Any], *, name: str = "") -> Call:
    """Check the arguments and fill in the defaults. name: the name as typed, if it is not the method's own."""
    full = _complete(method, args)
    method.check(**full)
    texts = _texts(method, full, name)
    return Call(method=method, args=full, text=texts["text"], short=texts["short"])


def declared(name: str, args: Mapping[str, Any]) -> "Coded | None":
    """Return what a method with residuals stores, from its entry in a manifest; None for other methods.

    Its centre is not parsed, because decoding needs only what is stored; so torch is not imported. Raises UsageError.
    """
    from flexmerge_cli.methods import coded, experts

    found = getattr(coded, name, None)
    if name == "free":
        found = experts.free
        args = {key: value for key, value in args.items() if key in found.parameters}
    if not isinstance(found, coded.CodedMethod):
        return None
    stored: Coded = found.function(**_complete(found, args))
    return stored


def make_step(step: Step, args: Mapping[str, Any]) -> StepCall:
    """Check the arguments and fill in the defaults."""
    full = _complete(step, args)
    step.check(**full)
    return StepCall(step=step, args=full, **_texts(step, full))


def make_calibration(calibration: Calibration, args: Mapping[str, Any]) -> CalibrationCall:
    """Check the arguments and fill in the defaults."""
    full = _complete(calibration, args)
    return CalibrationCall(calibration=calibration, args=full, **_texts(calibration, full))


def _named(kind: type[Named]) -> Iterator[tuple[str, Named]]:
    for module in MODULES:
        for value in vars(importlib.import_module(f"flexmerge_cli.methods.{module}")).values():
            if isinstance(value, kind):
                yield value.name, value


def _same_word(name: str) -> str:
    """Spell the name as it is spelt here."""
    return name.lower().replace("-", "_")


OPTIONS = {"method": "--method", "step": "--step", "calibration": "--calibrate"}
MANY = 8  # names that a hint can list without hiding its point


def _unknown(kind: str, name: str) -> UsageError:
    """Return the error for an unknown name: what else it names, or the nearest name of any kind."""
    absent = explain_absent(name) if kind == "method" else None
    if absent is not None:
        what, hint = absent
        return UsageError(f"no method `{name}`: it {what}", hint=hint)
    word = _same_word(name)[:MAX_WORD]
    known = {"method": [*all_methods(), "auto"], "step": list(all_steps()), "calibration": list(all_calibrations())}
    for other, names in known.items():
        if word in names and other != kind:
            return UsageError(f"`{word}` is a {other}, not a {kind}", hint=f"write {OPTIONS[other]} {word}")
    order = [kind, *(other for other in known if other != kind)]
    kind_of = {found: other for other in reversed(order) for found in known[other]}
    near = difflib.get_close_matches(word, kind_of, 1)
    if near:
        found = kind_of[near[0]]
        hint = f"did you mean `{near[0]}`?"
        if found != kind:
            hint = f"did you mean the {found} `{near[0]}`? Write {OPTIONS[found]} {near[0]}"
    else:
        names = known[kind]
        hint = f"one of: {', '.join(names)}" if len(names) <= MANY else "`flexmerge methods` lists and explains them"
    return UsageError(f"no {kind} `{name}`", hint=hint)


def _complete(declared: Method | Step | Calibration, args: Mapping[str, Any]) -> dict[str, Any]:
    return complete(declared.name, declared.parameters, args)


def complete(name: str, parameters: Mapping[str, Parameter], args: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments in the order of the signature. Null means the default. Raises UsageError."""
    for key in args:
        if key not in parameters:
            near = difflib.get_close_matches(key[:MAX_WORD], parameters, 1)
            known = ", ".join(parameters) or "none"
            hint = f"did you mean `{near[0]}`?" if near else f"`{name}` takes: {known}"
            raise UsageError(f"`{name}` has no argument `{key}`", hint=hint)
    return {
        key: parameter.default if args.get(key) is None else parameter.check(args[key], name)
        for key, parameter in parameters.items()
    }


def _texts(declared: Method | Step | Calibration, args: Mapping[str, Any], name: str = "") -> dict[str, str]:
    """Return the texts of a call, in full and without defaults."""
    changed = {key: value for key, value in args.items() if value != declared.parameters[key].default}
    name = name or declared.name
    return {"text": format_call(name, args), "short": format_call(name, changed)}


def split_call(text: str) -> tuple[str, dict[str, Any]]:
    """Split the text into the name and the arguments as written, unchecked."""
    name, colon, rest = text.strip().partition(":")
    args: dict[str, Any] = {}
    for item in _split(rest) if colon else ():
        key, equals, value = item.partition("=")
        if not equals or not key.strip() or key.strip() in args:
            of_file = name.endswith(".py") and not equals
            hint = f"./{name}#{item.strip()}" if of_file else "write NAME:key=value,key=value"
            raise UsageError(f"cannot read `{item.strip()}` in method `{text}`", hint=hint)
        if value.strip().startswith("@"):  # It names a file, and YAML reserves the character.
            args[key.strip()] = value.strip()
            continue
        try:
            args[key.strip()] = load_bounded(value, _Loader)
        except yaml.YAMLError:
            raise UsageError(
                f"`{value}` is not a valid YAML value, in method `{text}`", hint="quote it: key='…'"
            ) from None
    return name, args


def format_call(name: str, args: Mapping[str, Any]) -> str:
    """Write the text that `split_call` reads back."""
    return name + (":" if args else "") + ",".join(f"{key}={_scalar(value)}" for key, value in args.items())


class _Loader(BoundedLoader):
    """Parses numbers as in YAML 1.2, where `1e-5` is a number; YAML 1.1 reads it as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _scalar(value: Any) -> str:
    plain = isinstance(value, str) and not set(value) & set(",:={}[]'\"")
    return value if plain and _is_read_back(value) else json.dumps(value)


def _is_read_back(text: str) -> bool:
    try:
        return bool(load_bounded(text, _Loader) == text)
    except yaml.YAMLError:
        return False


def _split(text: str) -> list[str]:
    """Split at commas outside quotes and brackets."""
    items, depth, quote, current = [], 0, "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        if character == "," and not quote and depth == 0:
            items.append(current)
            current = ""
        else:
            current += character
    return [*items, current]
