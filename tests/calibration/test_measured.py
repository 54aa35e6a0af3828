"""What `calibrate` measures, beside a plain loop over the examples with transformers and autograd in float64."""

import json

import numpy as np
import pytest
import torch
import transformers

from flexmerge_cli.formats.calibration import STATISTICS, unpacked
from flexmerge_cli.methods.method import Where
from flexmerge_cli.random import key64, uniform

from ..evaluation import tiny
from ..program import succeeds, tree
from .families import NUM_EXAMPLES, TASKS


def examples(family, task):
    """The keyword arguments of the model, one example each."""
    if (family.folder / f"{task}.npz").exists():
        seen = np.load(family.folder / f"{task}.npz")["images"].astype(np.float32)
        pixels = torch.from_numpy((seen / 255 - 0.5) / 0.25)
        return [{"pixel_values": one[None]} for one in pixels]
    rows = [json.loads(line)["text"] for line in (family.folder / f"{task}.jsonl").read_text().splitlines()]
    ids = [tiny.tokenizer()(text)["input_ids"] for text in rows]
    return [{"input_ids": torch.tensor([one])} for one in ids if len(one) > 1]


def model_of(family, task):
    folder = family.folder / "tasks" / task
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def layer_rows(module, x):
    if isinstance(module, torch.nn.Conv2d):
        x = torch.nn.functional.unfold(x, module.kernel_size, stride=module.stride).transpose(1, 2)
        return x.reshape(-1, x.shape[-1]).double()
    if isinstance(module, torch.nn.Embedding):
        return torch.nn.functional.one_hot(x.flatten(), module.num_embeddings).double()
    return x.reshape(-1, x.shape[-1]).double()


def observed(model, inputs):
    """Module -> rows of inputs, rows of outputs, over all examples."""
    seen = {}

    def hook(module, args, output, name):
        y = output.movedim(1, -1) if isinstance(module, torch.nn.Conv2d) else output
        seen.setdefault(name, []).append((layer_rows(module, args[0]), y.reshape(-1, y.shape[-1]).double()))

    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding, transformers.pytorch_utils.Conv1D)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda m, a, o, name=name: hook(m, a, o, name))
    with torch.no_grad():
        for one in inputs:
            model(**one)
    return {name: tuple(map(torch.cat, zip(*rows))) for name, rows in seen.items()}


def by_value(model, weights):
    """Name of the model's parameter -> name in the file: the one with the same numbers."""
    return {
        name: next(own for own, value in weights.items() if value.shape == p.shape and torch.equal(value, p.data))
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("task", TASKS[:2])
def test_inputs_and_outputs_are_those_of_a_plain_loop(done, task):
    calibration, place = done.family.read(done.output), TASKS.index(task)
    model, entry = model_of(done.family, task), calibration.index.tasks[task]
    names = by_value(model, done.family.weights(task))
    seen = observed(model, examples(done.family, task))
    measured = set()
    for module, (x, y) in seen.items():
        tensor = names.get(f"{module}.weight")  # of an output layer that is tied, the table has it
        if tensor not in entry.inputs:
            assert "classifier" in module or "lm_head" in module or "wte" in module, module
            continue
        measured.add(tensor)
        array = calibration._array(place, "inputs", tensor)
        expected = (x.T @ x / len(x)).numpy()
        layout = entry.inputs[tensor].layout
        if layout == "embedding":
            np.testing.assert_allclose(array, expected.diagonal(), rtol=1e-6)
        else:
            np.testing.assert_allclose(unpacked(array), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
            mean = calibration._array(place, "outputs", tensor)
            np.testing.assert_allclose(mean, y.mean(0), rtol=1e-4, atol=1e-5)
        assert entry.inputs[tensor].rows == len(x)
    assert measured == set(entry.inputs)


@pytest.mark.parametrize("task", TASKS[:1])
def test_fisher_is_that_of_autograd_one_example_at_a_time(done, task):
    calibration, place = done.family.read(done.output), TASKS.index(task)
    model = model_of(done.family, task).double()
    names, drawn, key = by_value(model.float(), done.family.weights(task)), 0, key64("flexmerge/fisher/1", 0, task)
    model.double()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    inputs = examples(done.family, task)
    for one in inputs:
        logits = model(**{k: v.double() if v.is_floating_point() else v for k, v in one.items()}).logits[0]
        likelihood = torch.log_softmax(logits.reshape(-1, logits.shape[-1]), -1)
        labels = []
        for row in likelihood.detach().exp():
            labels.append(int(np.searchsorted(row.cumsum(0).numpy(), uniform(key, drawn, 1)[0])))
            drawn += 1
        sum(row[label] for row, label in zip(likelihood, labels)).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad**2
        model.zero_grad()
    checked = 0
    for name, value in total.items():
        if names[name] in calibration.index.tasks[task].fisher:
            found = calibration._array(place, "fisher", names[name]).reshape(value.shape)
            expected = (value / len(inputs)).numpy()
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-12 + 1e-4 * np.abs(expected).max())
            checked += 1
    assert checked == len(calibration.index.tasks[task].fisher) > 5


def test_layers_with_the_same_inputs_store_them_once(pictures):
    calibration = pictures.family.read(pictures.output)
    of = {name: entry.of for name, entry in calibration.index.tasks["a"].inputs.items() if entry.of}
    (query,) = set(of.values())
    assert "query" in query and len(of) == 2
    key = next(iter(of))
    for task, place in (("a", 0), ("c", 2)):
        shared = calibration.measured("inputs", Where(tasks=(task,), tensor=key, start=0, shape=(16, 16)), 256)
        assert np.array_equal(shared[0], unpacked(calibration._array(place, "inputs", query)))


def test_numbers_do_not_depend_on_how_much_is_held(pictures, tmp_path, monkeypatch):
    from flexmerge_cli.calibration import measure

    monkeypatch.setattr(measure, "HELD_BYTES", 3000)
    succeeds(*pictures.family.command(tmp_path / "again"))
    for task in TASKS:
        one, other = (read(folder, task) for folder in (pictures.output, tmp_path / "again"))
        assert one.keys() <= other.keys()  # in other runs, layers do not know that they have the same inputs
        assert all(np.array_equal(one[name], other[name]) for name in one)


def read(folder, task):
    from safetensors.numpy import load_file

    return load_file(folder / "tasks" / f"{task}.safetensors")


def test_a_second_run_gives_the_same_bytes(pictures, tmp_path):
    succeeds(*pictures.family.command(tmp_path / "again"))
    assert tree(tmp_path / "again") == tree(pictures.output)


def test_a_dry_run_tells_the_sizes_and_writes_nothing(pictures, tmp_path):
    told = succeeds(*pictures.family.command(tmp_path / "never", "--dry-run", "--json")).json
    assert not (tmp_path / "never").exists()
    written = read(pictures.output, "a")
    least = {of: sum(v.nbytes for name, v in written.items() if name.endswith(of)) for of in ("inputs", "fisher")}
    assert told["tasks"]["a"]["bytes"]["fisher"] == least["fisher"]
    assert told["tasks"]["a"]["bytes"]["inputs"] == least["inputs"] + 2 * 4 * (16 * 17 // 2)  # k and v beside q
    assert told["tasks"]["a"]["examples"] == NUM_EXAMPLES and STATISTICS[0] in told["tasks"]["a"]["bytes"]
