"""Every merging method, step and calibration of the registry, with its defaults and with each word that it takes.

Made from the declarations, so a method is tested on the day its file appears.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.method import Parameter
from flexmerge_cli.methods.registry import all_methods, all_steps, make_call, make_step
from flexmerge_cli.methods.step import StepCall

from .golden import is_merging

# Fewer iterations than the default, which take seconds.
FASTER: Mapping[str, Mapping[str, Any]] = {"wudi": {"steps": 5}}


def arguments(parameters: Mapping[str, Parameter]) -> Iterator[dict[str, Any]]:
    """The defaults; then each argument that takes words or true and false at each of them, the rest at the default."""
    yield {}
    for name, parameter in parameters.items():
        for value in (*parameter.choices, *((True, False) if bool in parameter.kinds else ())):
            if value != parameter.default:
                yield {name: value}


def _label(name: str, args: Mapping[str, Any]) -> str:
    return name + "".join(f"-{key}={value}" for key, value in args.items())


CALLS: dict[str, Call] = {
    _label(name, args): make_call(method, {**FASTER.get(name, {}), **args})
    for name, method in all_methods().items()
    if is_merging(name)
    for args in arguments(method.parameters)
}

STEPS: dict[str, StepCall] = {
    _label(name, args): make_step(step, args)
    for name, step in all_steps().items()
    for args in arguments(step.parameters)
}
