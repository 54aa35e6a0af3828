"""What `methods` tells: every method with paper, arguments and what it stores; or one of them, explained."""

import inspect
from typing import Any

from flexmerge_cli.methods.method import Method
from flexmerge_cli.methods.registry import all_methods, parse_call
from flexmerge_cli.report.text import table

STORED = {
    False: ("one dense value", "s·n"),
    True: ("unified delta, base, one mask per task", "s·n + s·n(base) + k·⌈n/8⌉"),
}


def method_list() -> dict[str, Any]:
    return {"methods": [_record(method) for method in all_methods().values()]}


def method_page(name: str) -> dict[str, Any]:
    """Raises UsageError for a name that is not known."""
    method = parse_call(name).method
    return _record(method) | {"text": inspect.getdoc(method.function) or ""}


def show_list(value: dict[str, Any]) -> None:
    rows = [
        (m["name"], m["paper"], ", ".join(f"{a['name']}={a['default']}" for a in m["arguments"]), m["size"], m["when"])
        for m in value["methods"]
    ]
    table(["method", "paper", "arguments", "bytes of a group", "when"], rows, left=5)
    print("k tasks in the group, n elements, s bytes per element. One explained: flexmerge methods NAME")


def show_page(value: dict[str, Any]) -> None:
    print(f"{value['name']} ({value['paper']})\n\n{value['text']}\n")
    table(["argument", "takes", "default"], [(a["name"], a["takes"], a["default"]) for a in value["arguments"]], left=3)
    print(f"stores: {value['stored']}; bytes of a group: {value['size']}; scope: {value['scope']}")


def _record(method: Method) -> dict[str, Any]:
    stored, size = STORED[method.masked]
    call = parse_call(method.name)
    return {
        "name": method.name,
        "paper": method.paper,
        "summary": method.summary,
        "when": method.when,
        "scope": call.scope,
        "stored": stored + (", one factor per task and block" if call.gain else ""),
        "size": size + (" + 4k" if call.gain else ""),
        "arguments": [{"name": p.name, "takes": p.wants(), "default": p.default} for p in method.parameters.values()],
    }
