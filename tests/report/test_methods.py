"""`flexmerge methods`: nothing is missing, names lead somewhere, and the formulas are the bytes of the layout."""

import math
import re

import pytest

from flexmerge_cli.calibration.tuners import TUNERS
from flexmerge_cli.methods.aliases import ALIASES
from flexmerge_cli.methods.registry import all_calibrations, all_methods, all_steps, parse_call
from flexmerge_cli.report import table
from flexmerge_cli.stored.form import GroupTensor
from flexmerge_cli.stored.forms import form_of

from ..program import fails, succeeds

CODED = (
    "low_bit:bits=1", "low_bit:bits=3,levels=empirical", "low_bit:bits=8,centre=none", "low_bit:bits=5,centre=base",
    "low_bit:bits=1,gain=norm,centre=average,centre_bits=8,scales=bfloat16,clip=search", "low_bit:centre_bits=3",
    "bitdelta:scale=row,centre=average", "low_rank:rank=7", "low_rank:fraction=0.3", "sparse:density=0.2",
    "free:select=row,density=0.05",
)  # fmt: skip

SIGNS = {"⌈": "ceil(", "⌉": ")", "⌊": "floor(", "⌋": ")", "·": "*", "≈": "="}


@pytest.mark.parametrize("call", [*all_methods(), *CODED])
@pytest.mark.parametrize(("dtype", "item_bytes"), [("F32", 4), ("BF16", 2)])
@pytest.mark.parametrize("num_tasks", [4, 9])
def test_the_formula_is_what_a_group_stores(call, dtype, item_bytes, num_tasks):
    shape = (96, 161)
    parsed, same = parse_call(call), tuple(range(num_tasks))
    group = GroupTensor(
        call=parsed, name="layer.weight", shape=shape, dtypes=(dtype,) * num_tasks, base_dtype=dtype, same=same
    )
    found = form_of(parsed).layout(group)
    assert found is not None
    counted = found.num_bytes + found.base * math.prod(shape) * item_bytes
    formula = form_of(parsed).summary(parsed).num_bytes
    told = evaluate(formula, k=num_tasks, m=shape[0], c=shape[1], s=item_bytes)
    assert told == pytest.approx(counted, rel=0.02 if "≈" in formula else 0)


def evaluate(formula: str, **values: float) -> float:
    """`s·n + k·p, p = ⌈n/8⌉`; what a block stores besides, after `;`, is not of a tensor."""
    known = {"ceil": math.ceil, "floor": math.floor, "log2": math.log2, "min": min, "n": values["m"] * values["c"]}
    known |= values
    code = formula.split(";")[0].translate(str.maketrans(SIGNS))
    total, *definitions = re.split(r", (?=[a-z] = )", code)
    for definition in definitions:
        name, _, value = definition.partition(" = ")
        known[name] = eval(value, {}, known)
    return float(eval(total, {}, known))


def test_every_method_step_and_calibration_is_listed_with_all_that_it_takes():
    value = succeeds("methods", "--json").json
    kinds = {"methods": all_methods(), "steps": all_steps(), "calibrations": all_calibrations(), "tune": TUNERS}
    for kind, known in kinds.items():
        assert [one["name"] for one in value[kind]] == list(known)
        for one in value[kind]:
            assert one["paper"] and one["summary"]
            assert [argument["name"] for argument in one["arguments"]] == list(known[one["name"]].parameters)
    assert all(method["when"] and method["stored"] and method["size"] for method in value["methods"])
    assert [alias["name"] for alias in value["mergekit"]] == list(ALIASES)


def test_the_list_holds_all_of_it_and_fits_a_terminal_of_100_columns(monkeypatch):
    monkeypatch.setattr(table, "line_columns", lambda: 100)
    printed = succeeds("methods").out
    assert max(len(line) for line in printed.splitlines() if line.startswith(" ")) <= 100
    words = "".join(printed.split())
    for one in (*all_methods().values(), *all_steps().values(), *all_calibrations().values(), *TUNERS.values()):
        assert one.name in words and all(f"{name}=" in words for name in one.parameters)


@pytest.mark.parametrize("name", [*all_methods(), *all_steps(), *all_calibrations(), *TUNERS])
def test_every_name_is_explained(name):
    printed = succeeds("methods", name).out
    whats = [one["what"] for one in succeeds("methods", name, "--json").json["found"]]
    known = {"method": all_methods(), "step": all_steps(), "calibration": all_calibrations()}
    known["method of tune"] = TUNERS
    assert whats == [what for what in known if name in known[what]]
    for what in whats:
        declared = known[what][name]
        assert f"{what} {name} ({declared.paper})" in printed and declared.summary.split(". ")[0] in " ".join(
            printed.split()
        )
        assert all(f" {argument} " in printed for argument in declared.parameters)


@pytest.mark.parametrize("name", ALIASES)
def test_a_name_of_mergekit_tells_what_it_is_here(name):
    page = succeeds("methods", name)
    assert f"mergekit's `{name}` is `--method {ALIASES[name][0]}" in page.out
    assert (f"method {name} (" in page.out) == (name in all_methods())


def test_a_page_is_of_the_arguments_that_are_given():
    assert "8 bits an element" in succeeds("methods", "low_bit:bits=8").out
    assert "p=0.5" not in fails(2, "methods", "dare:q=0.5", says="no argument `q`").out
    fails(2, "methods", "tie", says="did you mean `ties`?")
    fails(2, "methods", "zzz", says="`flexmerge methods` lists")
