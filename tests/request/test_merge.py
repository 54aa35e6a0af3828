"""What is asked is parsed once, whoever asks it; what would not be read is refused."""

import pickle

import pytest
import yaml

from flexmerge_cli import OrderSettings, load_plan, make_plan, merge
from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.errors import FlexmergeError, UsageError
from flexmerge_cli.request.choices import Auto, Clusters, Cut, Exact, Servable
from flexmerge_cli.request.curve import curve_methods
from flexmerge_cli.request.merge import merge_request
from flexmerge_cli.request.size import parse_size

from ..adapters import LORA, make
from ..program import fails, flexmerge, succeeds

UNREAD = [
    ({"steps": ["nonsense"]}, "--step"),
    ({"calibrate": "bogus"}, "--calibrate"),
    ({"method_for": ["*.attention=ties"]}, "--method-for"),
    ({"fit": "prefix"}, "--fit"),
    ({"cluster": "channels"}, "--cluster"),
    ({"seed": 0}, "--seed"),
    ({"method": "auto", "fit": "prefix"}, "--fit"),
    ({"method": "auto", "size": "1x", "fit": "tight"}, "--fit"),
    ({"method": "auto", "steps": ["dare"]}, "--step"),
    ({"method": "auto", "calibrate": "svc"}, "--calibrate"),
    ({"method": "auto", "merges": 0}, "--merges"),
    ({"method": "auto", "cluster": "channels"}, "--cluster"),
    ({"method": "auto", "seed": 1}, "--seed"),
    ({"method": "average", "seed": 1}, "--seed"),
    ({"method": "average", "fit": "prefix"}, "--fit"),
    ({"method": "average", "fit": "prefix", "merges": 2}, "--fit"),
    ({"method": "average", "cluster": "channels", "size": "2x", "fit": "tight"}, "--fit"),
    ({"method": "average", "cluster": "channels", "size": "2x", "merges": 1}, "--merges"),
    ({"method": "average", "cluster": "channels", "size": "2x", "method_for": ["a=keep"]}, "--method-for"),
    ({"servable": "lora", "fit": "prefix"}, "--fit"),
    ({"servable": "lora", "method": "average"}, "--servable"),
]
UNKNOWN = [
    ({"method": "average", "size": "2x", "fit": "bogus"}, "--fit bogus"),
    ({"method": "average", "size": "2x", "cluster": "foo"}, "--cluster foo"),
    ({"dtype": "F64"}, "--dtype F64"),
    ({"method": "ties", "size": "2y"}, "`2y` is not a size"),
    ({"method": "ties", "max_distance": -1.0}, "--max-distance -1.0"),
    ({"method": "ties", "max_distance": float("inf")}, "--max-distance inf"),
    ({"method": "ties", "merges": -1}, "--merges -1"),
    ({"servable": "ia3"}, "--servable ia3"),
    ({"servable": "lora:rank=0"}, "--servable lora:rank=0"),
]


def options(words):
    """The command line's options for words of `merge_request`."""
    found = []
    for name, value in words.items():
        option = "--step" if name == "steps" else f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, list) else [value]:
            found += [option, item]
    return found


@pytest.mark.parametrize(("words", "option"), UNREAD, ids=str)
def test_an_option_that_would_not_be_read_is_refused_from_everywhere(words, option, plan, family, tmp_path):
    with pytest.raises(UsageError, match=option):
        merge_request(**words)
    fails(2, "merge", plan, *options(words), "-o", tmp_path / "b", says=option)
    with pytest.raises(UsageError, match=option):
        merge(plan, tmp_path / "b", **words)
    recipe = {"version": 1, "base": str(family.base), "tasks": family.sources, "merge": dict(words)}
    if "method_for" in words:
        recipe["merge"]["method_for"] = dict(item.split("=") for item in words["method_for"])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    fails(2, "merge", tmp_path / "r.yaml", "-o", tmp_path / "b", says=option)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("words", "says"), UNKNOWN, ids=str)
def test_a_word_that_is_not_known_is_refused_from_everywhere(words, says, plan, tmp_path):
    with pytest.raises(UsageError) as raised:
        merge_request(**words)
    assert says in raised.value.message
    with pytest.raises(UsageError):
        merge(plan, tmp_path / "b", **words)
    assert flexmerge("merge", plan, *options(words), "-o", tmp_path / "b").code == 2
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_a_request_is_refused():
    for words in ({"method": "ties", "method_for": ["nothing"]}, {"method": "ties", "max_distance": float("nan")}):
        with pytest.raises(UsageError):
            merge_request(**words)


def test_python_takes_the_words_of_the_command_line(plan, tmp_path):
    for name, fit in (("one", "tight"), ("two", None)):
        merge(plan, tmp_path / name, method="average", size="2.2x", fit=fit, dtype="bf16")
    succeeds("merge", plan, "--method", "average", "--size", "2.2x", "--dtype", "bf16", "-o", tmp_path / "three")
    texts = [(tmp_path / name / "manifest.json").read_bytes() for name in ("one", "two", "three")]
    assert texts[0] == texts[1] == texts[2]


def test_a_method_from_a_file_runs_once_also_from_python(plan, tmp_path):
    runs = tmp_path / "runs"
    (tmp_path / "my.py").write_text(
        "from pathlib import Path\n"
        f"with Path({str(runs)!r}).open('a') as file:\n    file.write('x')\n"
        "from flexmerge_cli.methods.method import method\n"
        "@method(paper='own', scope='element')\n"
        "def mine(deltas):\n    return deltas[0]\n"
    )
    bundle = merge(plan, tmp_path / "b", method=f"{tmp_path}/my.py#mine", size="1x")
    assert runs.read_text() == "x"
    assert bundle.manifest.methods[0].origin[0] == "my.py"
    runs.unlink()
    succeeds("merge", plan, "--method", f"{tmp_path}/my.py#mine", "--size", "1x", "-o", tmp_path / "c")
    assert runs.read_text() == "x"


def test_orders_take_words_and_refuse_what_is_not_read(family):
    assert OrderSettings(linkage="average").linkage == "average"
    for words in ({"linkage": "foo"}, {"strategy": "foo"}, {"similarity": "foo"}, {"seed": 5}, {"seed": -1}):
        with pytest.raises(UsageError):
            OrderSettings(**words)
    assert OrderSettings(strategy="random", seed=5).seed == 5
    fails(2, "plan", *family.arguments, "--seed", 5, "-o", family.root / "no.json", says="--seed 5 has no effect")
    for words in ({"adapters": "foo"}, {"statistics": "foo"}):
        with pytest.raises(UsageError, match="foo is not known"):
            make_plan(family.base, family.sources, **words)


def test_a_seed_that_no_file_could_hold_is_refused_before_a_weight_is_read(family, plan, tmp_path):
    """`plan` read all weights, and ended in an error of our own."""
    asked = ("--strategy", "random", "-o", tmp_path / "no.json", "--seed")
    for seed in (1 << 63, 10**30):
        fails(2, "plan", *family.arguments, *asked, seed, says="outside [0, 2^63)")
        for place, text in (
            ("order", "order: {strategy: random, "),
            ("merge", "merge: {cluster: channels, method: average, size: 2x, "),
        ):
            recipe = tmp_path / f"{place}.yaml"
            recipe.write_text(f"version: 1\nbase: {family.base}\ntasks: {family.root}/tasks\n{text}seed: {seed}}}\n")
            fails(2, "merge", recipe, "-o", tmp_path / "b", says="outside [0, 2^63)")
        options = ("--method", "average", "--cluster", "channels", "--size", "2x", "--seed", seed)
        fails(2, "merge", plan, *options, "-o", tmp_path / "b", says="outside [0, 2^63)")
    assert OrderSettings(strategy="random", seed=(1 << 63) - 1).seed


def test_a_seed_of_another_plan_is_kept_where_it_is_read(plan, tmp_path):
    succeeds("plan", plan, "--strategy", "random", "--seed", 3, "-o", tmp_path / "random.json")
    succeeds("plan", tmp_path / "random.json", "--blocks", "layer", "-o", tmp_path / "layers.json")
    assert load_plan(tmp_path / "layers.json").settings.seed == 3
    succeeds("plan", tmp_path / "random.json", "--strategy", "greedy", "-o", tmp_path / "greedy.json")
    assert load_plan(tmp_path / "greedy.json").order == load_plan(plan).order


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ({}, Exact),
        ({"method": "ties:K=0.3", "steps": ["dare:p=0.5"], "size": "40%", "fit": "prefix"}, Cut),
        ({"method": "average", "merges": 3, "method_for": {"*.mlp": "keep", "*.attn": "emr"}}, Cut),
        ({"method": "average", "cluster": "channels", "size": "2x", "seed": 4}, Clusters),
        ({"method": "auto:max_bits=4", "size": "1x", "dtype": "bf16"}, Auto),
        ({"servable": "lora:rank=4", "size": "2x"}, Servable),
        ({"method": "dare_ties", "steps": ["trim"], "size": "2x"}, Cut),
        ({"method": "average", "method_for": {"*.mlp": "della-linear"}}, Cut),
    ],
)
def test_the_options_of_a_request_ask_for_it_again(words, kind):
    request = merge_request(**words)
    assert isinstance(request.choice, kind)
    given = iter(request.words())
    again = {"steps": [], "method_for": []}
    for option, value in zip(given, given):
        name = {"--step": "steps"}.get(option, option.removeprefix("--").replace("-", "_"))
        if name in ("steps", "method_for"):
            again[name].append(value)
        else:
            again[name] = int(value) if name in ("merges", "seed") else value
    assert merge_request(**again) == request
    assert pickle.loads(pickle.dumps(request)) == request


def test_3x_counts_the_same_models_everywhere(tmp_path):
    """Two full models and a kept adapter are three."""
    made = make(tmp_path, "llama", {"lora": LORA(r=2, target_modules=["q_proj"])})
    full = [word for n in (1, 2) for word in ("--task", f"full{n}={made.full(f'full{n}', n)}")]
    plan = tmp_path / "plan.json"
    succeeds("plan", "--base", made.base, "--tasks", made.tasks, *full, "-o", plan, "--size", "3x")
    succeeds("plan", plan, "--size", "3x", "-o", tmp_path / "other.json")
    succeeds("merge", plan, "--method", "average", "--size", "3x", "-o", tmp_path / "b", "--dry-run")
    loaded = load_plan(plan)
    (average,) = curve_methods("average", has_statistics=False)
    assert allocate(loaded, average.request.at(parse_size("3x"))).allocation.merges == 0
    fails(2, "plan", plan, "--size", "3.1x", "-o", tmp_path / "no.json", says="(0x, 3x]")


def test_a_table_of_methods_parses_each_of_them_once(plan, monkeypatch):
    """Arguments are parsed when a method is named, and never again for a tensor or a group."""
    from flexmerge_cli.allocation.layout import Pricer
    from flexmerge_cli.allocation.options import storage_options
    from flexmerge_cli.methods import registry

    loaded, count, parse = load_plan(plan), 0, registry.split_call

    def counted(text):
        nonlocal count
        count += 1
        return parse(text)

    storage_options(Pricer(loaded), "plan.json")
    monkeypatch.setattr(registry, "split_call", counted)
    storage_options(Pricer(loaded), "plan.json")
    assert 0 < count < 40


def test_errors_are_of_the_package(plan, tmp_path):
    for words in ({"method": "./nope.py#x"}, {"method": "a.py"}):
        with pytest.raises(FlexmergeError):
            merge(plan, tmp_path / "b", **words)
