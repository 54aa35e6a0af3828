"""Shows the methods, steps and calibrations with paper, arguments, bytes and use, or one of them in detail."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flexmerge_cli.calibration.tuners import TUNERS, Tuner
from flexmerge_cli.methods.aliases import ALIASES, resolve_alias
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.load import packaged_methods
from flexmerge_cli.methods.method import Parameter
from flexmerge_cli.methods.registry import (
    all_calibrations,
    all_methods,
    all_steps,
    complete,
    make_calibration,
    make_call,
    make_step,
    parse_call,
    resolve,
    split_call,
)
from flexmerge_cli.methods.step import CalibrationCall, StepCall
from flexmerge_cli.report.table import say, table
from flexmerge_cli.request.auto_options import auto
from flexmerge_cli.stored.forms import form_of

LEGEND = (
    "Bytes are those of one group of k tasks and one tensor of n elements, m rows of c, of s bytes each. Groups of "
    "one task, and groups that copies would not enlarge, are stored as copies. The base is stored once for all groups."
)
TITLES = {
    "search": "Chosen for a size, from the plan alone",
    "model": "One model per group: one dense value, s·n bytes",
    "masks": "A model per group, and a mask per task",
    "superposition": "A superposition per group, and nothing per task",
    "residuals": "A centre per group, and a residual per task",
    "experts": "A centre per group, and an expert per task, among which layers choose",
}


def method_list() -> dict[str, Any]:
    return {
        "search": [_auto(make_call(auto, {}))],
        "methods": [_method(parse_call(name)) for name in all_methods()],
        "steps": [_step(make_step(step, {})) for step in all_steps().values()],
        "calibrations": [_calibration(make_calibration(found, {})) for found in all_calibrations().values()],
        "tune": [_tuner(tuner) for tuner in TUNERS.values()],
        "installed": sorted(packaged_methods()),
        "mergekit": [_alias(name) for name in ALIASES],
    }


def method_page(text: str) -> dict[str, Any]:
    """Return all entries of a name: a method (`NAME:key=value` with these arguments), a step, a calibration, a method
    of `tune`, mergekit's.

    Raises UsageError for an unknown name.
    """
    name, args = split_call(text)
    found = []
    if name in all_steps():
        found.append(_step(make_step(all_steps()[name], {} if name in all_methods() else args)))
    if name in all_calibrations():
        found.append(_calibration(make_calibration(all_calibrations()[name], args)))
    mergekit = _alias(name) if resolve_alias(name) else None
    if name in TUNERS:
        complete(name, TUNERS[name].parameters, args)
        found.append(_tuner(TUNERS[name]))
    if name == auto.name:
        found.append(_auto(make_call(auto, args)))
    elif name in all_methods() or (not found and not resolve(text).message):
        found.insert(0, _method(parse_call(text, run_files=True)))  # the user typed it
    return {"name": name, "found": found, "mergekit": mergekit}


def show_list(value: dict[str, Any]) -> None:
    for kind, title in TITLES.items():
        rows = [method for method in (*value["search"], *value["methods"]) if method["kind"] == kind]
        _show_rows(title, "when", rows)
    _show_rows("Steps, before a method: --step NAME", "does", value["steps"])
    _show_rows("Calibrations, after a method: --calibrate NAME", "does", value["calibrations"])
    _show_rows("Found on unlabelled examples: flexmerge tune --method NAME", "does", value["tune"])
    say(LEGEND)
    if value["installed"]:
        say(f"From installed packages: {', '.join(value['installed'])}")
    say(f"Names from mergekit: {', '.join(alias['name'] for alias in value['mergekit'])}")
    print("To explain one: flexmerge methods NAME")


def show_page(value: dict[str, Any]) -> None:
    for one in value["found"]:
        say(f"{one['what']} {one['name']} ({one['paper']})")
        for paragraph in one["text"].split("\n\n"):
            print()
            for line in paragraph.split("\n") if "\n " in paragraph else [paragraph.replace("\n", " ")]:
                say(line)
        print()
        if one["arguments"]:
            rows = [(a["name"], a["takes"], _written(a["default"])) for a in one["arguments"]]
            table(["argument", "takes", "default"], rows, text=(1, 2))
        if one["what"] == "method":
            heads = {"when": "when:  ", "needs": "needs: ", "stored": "stores:", "size": "bytes: "}
            for key in filter(one.get, heads):
                say(f"{heads[key]} {one[key]}")
        if one["scope"]:
            print(f"scope:  {one['scope']}\n")
        if one["what"] == "method":
            say(LEGEND)
            print()
    if value["mergekit"]:
        say(value["mergekit"]["message"])


def _show_rows(title: str, last: str, rows: Sequence[dict[str, Any]]) -> None:
    """Show a list with several lines for each name, the first of which says what it is for."""
    cells = []
    for row in rows:
        lines = [row["when"] if last == "when" else row["summary"].split(" [")[0]]  # drop the shapes
        lines.append(", ".join(f"{a['name']}={_written(a['default'])}" for a in row["arguments"]))
        if row.get("needs"):
            lines.append(f"needs {row['needs']}")
        if row.get("kind", "model") != "model":
            lines.append(f"stores {row['stored']}: {row['size']}")
        cells += [
            (row["name"] if place == 0 else "", text) for place, text in enumerate(filter(None, [*lines, row["paper"]]))
        ]
    table(["name", f"{last}, arguments, what is stored, paper"], cells, title=title, text=(1,))


def _method(call: Call) -> dict[str, Any]:
    form, method = form_of(call), call.method
    summary = form.summary(call)
    return {
        "what": "method",
        "kind": form.product,
        **_common(method, call.scope),
        "when": method.when,
        "needs": f"{method.reads} of --calibration" if method.reads else None,
        "stored": summary.parts,
        "size": summary.num_bytes,
    }


def _auto(call: Call) -> dict[str, Any]:
    return {
        "what": "method",
        "kind": "search",
        **_common(call.method, "model"),
        "when": call.method.when,
        "needs": None,
        "stored": "per tensor a coded or dense centre, or none; per task up to 8 bits a weight, or a copy",
        "size": "what --size says",
    }


def _step(call: StepCall) -> dict[str, Any]:
    return {"what": "step", **_common(call.step, call.scope)}


def _calibration(call: CalibrationCall) -> dict[str, Any]:
    return {"what": "calibration", **_common(call.calibration, "tensor")}


def _tuner(tuner: Tuner) -> dict[str, Any]:
    return {"what": "method of tune", **_common(tuner, "")}


def _common(declared: Any, scope: str) -> dict[str, Any]:
    """Return the fields common to methods, steps, calibrations and methods of `tune`."""
    parameters: Mapping[str, Parameter] = declared.parameters
    return {
        "name": declared.name,
        "paper": declared.paper,
        "summary": declared.summary,
        "text": inspect.getdoc(declared.function) or "",
        "scope": scope,
        "arguments": [{"name": p.name, "takes": p.wants(), "default": p.default} for p in parameters.values()],
    }


def _alias(name: str) -> dict[str, Any]:
    alias = resolve_alias(name)
    assert alias is not None
    return {"name": name, "method": alias.method, "steps": list(alias.steps), "message": alias.message}


def _written(default: Any) -> str:
    return default if isinstance(default, str) else json.dumps(default)
