"""Loads user-defined methods from a file, `./my.py#my_method`, or from an installed package.

A package lists its methods as entry points of the group `flexmerge.methods`: `my_method = "my_package:my_method"`.
Both run code, so the caller needs the user's consent (registry.parse_call).
"""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from flexmerge_cli.errors import FlexmergeError, UsageError
from flexmerge_cli.methods.coded import CodedMethod
from flexmerge_cli.methods.method import Method, Origin
from flexmerge_cli.regular_file import read_file

GROUP = "flexmerge.methods"
MAX_BYTES = 16 << 20


def method_from_file(file: str | Path, name: str, source: bytes | None = None) -> Method:
    """Run a Python file and return its method of this name. Its origin is the file name and the sha256 of what was run.

    source: the file's bytes, if they have already been read, for example by the process that parsed the call first.

    Raises UsageError if it cannot be read, fails, or has no such method.
    """
    path = Path(file)
    if source is None:
        try:
            source = read_file(path, MAX_BYTES, "a method's file")
        except FlexmergeError as error:
            raise UsageError(f"cannot read `{path}`: {error.message}", hint="write ./FILE.py#NAME") from None
    digest = hashlib.sha256(source).hexdigest()
    module = ModuleType(f"flexmerge_file_{digest[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look up their module there
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except Exception as error:
        raise UsageError(f"`{path}` fails: {type(error).__name__}: {error}") from error
    if name not in vars(module):
        there = [key for key, value in vars(module).items() if isinstance(value, Method)]
        raise UsageError(f"`{path}` has no `{name}`", hint=f"its methods: {', '.join(there) or 'none'}")
    origin = Origin(path.name, f"sha256:{digest}", source)
    return replace(_method(vars(module).get(name), f"{path}#{name}"), origin=origin)


def packaged_methods() -> Mapping[str, EntryPoint]:
    """Map the names of methods of installed packages to their entry points. Imports nothing."""
    return {point.name: point for point in entry_points(group=GROUP)}


def method_from_package(name: str) -> Method | None:
    """Import the method that an installed package offers under this name; None if there is none.

    Its origin is the distribution. Raises UsageError if the import fails or gives no method.
    """
    point = packaged_methods().get(name)
    if point is None:
        return None
    source = point.dist.name if point.dist else point.module
    try:
        value = point.load()
    except Exception as error:
        raise UsageError(f"method `{name}` of `{source}` fails: {type(error).__name__}: {error}") from error
    origin = Origin(source, point.dist.version if point.dist else "unknown")
    return replace(_method(value, f"{name} of {source}"), name=name, origin=origin)


def _method(value: Any, name: str) -> Method:
    if isinstance(value, CodedMethod):
        raise UsageError(
            f"`{name}` declares residuals, which a reader of the bundle could not decode",
            hint="write a @method that returns one merged task vector",
        )
    if isinstance(value, Method):
        return value
    hint = "write @method(paper=…, scope=…) above the function"
    what = "is a plain function" if isinstance(value, FunctionType) else "is not a method"
    raise UsageError(f"`{name}` {what}", hint=hint)
