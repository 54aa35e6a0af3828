"""Batches of several tasks: each example has the output of its task's model alone, shared products are taken once."""

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn import functional  # noqa: E402

from flexmerge_cli import open_bundle  # noqa: E402
from flexmerge_cli.bundle import resident  # noqa: E402
from flexmerge_cli.serving import meeting  # noqa: E402
from flexmerge_cli.serving.meeting import run_in_lockstep, shared_weights  # noqa: E402

from ..calls import no_thread_outlives  # noqa: E402
from ..transformers_families import FAMILIES, TASKS  # noqa: E402

FORMS = {
    "merged": {"method": "average", "size": "2x"},
    "auto": {"method": "auto", "size": "1x"},
    "dense centre": {"method": "low_bit:bits=2"},
    "low rank": {"method": "low_rank"},
    "masks": {"method": "emr"},
}
BATCH = ("beta", "alpha", "gamma", "beta")


@pytest.fixture(autouse=True)
def every_layer_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "LEAST_ELEMENTS", 0)


def inputs_of(name: str) -> dict:
    """Make a batch of four examples."""
    found = {key: torch.cat([value, value.flip(-1)]) for key, value in FAMILIES[name].inputs().items()}
    dtype = FAMILIES[name].dtype
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in found.items()}


@pytest.mark.parametrize("weights", ["dense", "packed"])
@pytest.mark.parametrize("name", ["vit", "bert with its prefix", "t5", "llama, tied", "gpt2", "whisper", "resnet"])
@pytest.mark.parametrize("form", ["merged", "auto"])
def test_every_example_has_the_output_of_its_task_alone(
    form: str, name: str, weights: str, bundle_of: Callable[..., Path]
) -> None:
    bundle = open_bundle(bundle_of(name, **FORMS[form]))
    runtime, inputs = bundle.runtime(weights=weights), inputs_of(name)
    found = runtime(inputs, BATCH)
    tolerance = 2e-2 if FAMILIES[name].dtype is torch.bfloat16 else 1e-5
    for place, task in enumerate(BATCH):
        with torch.inference_mode():
            alone = bundle.model(task)(**{key: value[place : place + 1] for key, value in inputs.items()})
        assert torch.allclose(found[place].logits, alone.logits[0], rtol=tolerance, atol=tolerance), task


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["t5", "gpt2", "llama, tied"])
def test_generated_sequences_are_those_of_each_task_alone(name: str, form: str, bundle_of: Callable[..., Path]) -> None:
    """Greedy, with padding on the left, and of tasks that stop at different lengths."""
    bundle = open_bundle(bundle_of(name, **FORMS[form]))
    ids = torch.tensor([[1, 1, 5, 7], [3, 4, 5, 6], [1, 9, 8, 7], [5, 5, 6, 30]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    found = bundle.runtime(weights="packed", dtype="fp32").generate(inputs, BATCH, **options)
    for task in TASKS:
        places = [place for place, name in enumerate(BATCH) if name == task]
        own = {key: value[places] for key, value in inputs.items()}
        alone = bundle.model(task, dtype=torch.float32).generate(**own, **options)
        for place, sequence in zip(places, alone):
            assert found[place].tolist() == sequence.tolist(), (task, place)


def test_a_shared_product_is_taken_once_for_all(
    bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every linear layer but the heads of a bundle of one group runs once, with the rows of all."""
    runtime = open_bundle(bundle_of("vit", method="average", size="1x")).runtime()
    products, multiply = [], meeting._Meeting._multiply

    def counted(self: meeting._Meeting) -> None:
        products.append(sorted((weight, len(x)) for weight, _, x, _ in self._waiting.values()))
        multiply(self)

    monkeypatch.setattr(meeting._Meeting, "_multiply", counted)
    runtime({key: value[:3] for key, value in inputs_of("vit").items()}, TASKS)
    joined = [waiting for waiting in products if waiting]
    layers = [layer for layer in runtime.model("alpha").modules() if isinstance(layer, torch.nn.Linear)]
    assert len(joined) == len(layers) - 1
    for waiting in joined:
        assert len(waiting) == 3 and len({key for key, _ in waiting}) == 1


def test_a_run_with_weights_of_its_own_gets_no_further_than_to_the_next_that_it_shares() -> None:
    """It passes its own without waiting, and those that share the next are not multiplied one after the other."""
    own, first, second = torch.eye(2), torch.eye(2), torch.eye(2)
    shared: meeting.Shared = {first.data_ptr(): {0, 1}, second.data_ptr(): {0, 1, 2}}
    products, multiply = [], meeting._Meeting._multiply

    def counted(self: meeting._Meeting) -> None:
        multiply(self)
        products.append(self._ready[:])

    def through(*weights: "torch.Tensor") -> Callable[[], "torch.Tensor"]:
        def run() -> "torch.Tensor":
            x = torch.ones(1, 2)
            for weight in weights:
                x = functional.linear(x, weight)
            return x

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting._Meeting, "_multiply", counted)
        run_in_lockstep([through(first, second), through(first, second), through(own, second)], shared)
        run_in_lockstep([through(first, second), through(second, first), through(own)], shared)
    assert products == [[0, 1], [0, 1, 2], [0, 1], [0, 1]]  # at last both wait for what the other has passed


def test_a_slice_or_transpose_of_a_shared_weight_is_another_product() -> None:
    """Both begin where the weight lies: a run got the product of another one."""
    weight, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(1, 2)
    runs = [partial(functional.linear, x, own) for own in (weight, weight[:1], weight.T)]
    found = run_in_lockstep(runs, {weight.data_ptr(): {0, 1, 2}})
    assert [own.tolist() for own in found] == [[[3, 7]], [[3]], [[4, 6]]]


def test_an_error_of_one_is_raised_and_none_waits_for_it() -> None:
    weight = torch.eye(2)

    def fails() -> "torch.Tensor":
        functional.linear(torch.ones(1, 2), weight)
        raise ArithmeticError("no")

    def works() -> "torch.Tensor":
        return functional.linear(functional.linear(torch.ones(1, 2), weight), weight)

    def wrong() -> "torch.Tensor":
        return functional.linear(torch.ones(1, 3), weight)

    with no_thread_outlives():
        with pytest.raises(ArithmeticError):
            run_in_lockstep([works, fails, works], {weight.data_ptr(): {0, 1, 2}})
        with pytest.raises(RuntimeError, match="shape"):
            run_in_lockstep([wrong, wrong], {weight.data_ptr(): {0, 1}})
        both = {weight.data_ptr(): {0, 1}}
        assert [found.tolist() for found in run_in_lockstep([works, works], both)] == [[[1, 1]]] * 2


def test_runs_join_between_tokens_and_begin_together() -> None:
    weight, products, going, ended = torch.eye(2), [], [], []

    def text(tokens: int) -> Callable[[], int]:
        def run() -> int:
            for _ in range(tokens):
                functional.linear(torch.ones(tokens, 2), weight)
                functional.linear(torch.ones(tokens, 2), weight)
                meeting.pause()
            ended.append(tokens)
            return tokens

        return run

    def joining(numbers: "Sequence[int]") -> tuple[list[Callable[[], int]], meeting.Shared]:
        going.append(list(numbers))
        return ([text(2), text(1)] if len(going) == 2 else []), {weight.data_ptr(): {0, 1, 2}}

    multiply = meeting._Meeting._multiply

    def counted(self: meeting._Meeting) -> None:
        products.append(sorted(self._waiting))
        multiply(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting._Meeting, "_multiply", counted)
        assert run_in_lockstep([text(4)], {weight.data_ptr(): {0, 1, 2}}, joining) == [4]
    assert sorted(ended) == [1, 2, 4]
    assert going == [[0], [0], [0, 1, 2], [0, 1]]
    assert products == [[0]] * 4 + [[0, 1, 2]] * 2 + [[0, 1]] * 2
    meeting.pause()  # of nobody


def test_nothing_is_kept_of_runs_that_have_joined_and_ended() -> None:
    class Result:
        pass

    def num_kept() -> int:
        return sum(type(one) in (Result, threading.Thread, threading.Semaphore) for one in gc.get_objects())

    def run() -> Result:
        meeting.pause()
        return Result()

    kept, num_calls = [num_kept()], count()

    def joining(_numbers: "Sequence[int]") -> tuple[list[Callable[[], Result]], meeting.Shared]:
        number = next(num_calls)
        if number == 300:
            kept.append(num_kept())
        return ([run] if number < 300 else []), {}

    assert len(run_in_lockstep([run], {}, joining)) == 1
    assert kept[1] - kept[0] < 100


def test_a_task_that_is_dropped_while_others_run_is_freed_after_its_own_run(bundle_of: Callable[..., Path]) -> None:
    runtime = open_bundle(bundle_of("vit", **FORMS["merged"])).runtime()
    model, is_held = weakref.ref(runtime.model("beta")), []

    def lasts(_model: object) -> None:
        for _ in range(5):
            meeting.pause()

    def joining() -> list:
        gc.collect()
        is_held.append(model() is not None)
        if len(is_held) == 3:
            runtime.drop("beta")
        return [("beta", lambda _model: None)] if len(is_held) == 1 else []

    runtime.run_in_lockstep([("alpha", lasts)], joining)
    assert is_held == [True, True, True, False, False]


def test_the_error_of_a_run_that_has_joined_is_raised_once_all_have_ended() -> None:
    def fails() -> None:
        raise ArithmeticError("no")

    def lasts() -> None:
        for _ in range(3):
            meeting.pause()
        ended.append(True)

    joining, ended = iter([[fails, fails], [], []]), []
    with pytest.raises(ArithmeticError):
        run_in_lockstep([lasts], {}, lambda _numbers: (next(joining), {}))
    assert ended


def test_a_run_that_pauses_takes_the_products_that_others_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own thread multiplies then, and must not wait for itself."""
    weight, nested, multiply = torch.eye(2), [0], meeting._Meeting._multiply

    def counted(self: meeting._Meeting) -> None:
        nested[0] += 1
        assert nested[0] == 1
        multiply(self)
        nested[0] -= 1

    monkeypatch.setattr(meeting._Meeting, "_multiply", counted)

    def pauses() -> int:
        meeting.pause()
        return 1

    def multiplies() -> int:
        for _ in range(2):
            functional.linear(torch.ones(1, 2), weight)
            torch.addmm(torch.ones(2), torch.ones(1, 2), weight)
        return 2

    both: meeting.Shared = {weight.data_ptr(): {0, 1}}
    thread = threading.Thread(
        target=lambda: found.extend(run_in_lockstep([multiplies, pauses], both, lambda _going: ([], both))), daemon=True
    )
    found: list[int] = []
    thread.start()
    thread.join(20)
    assert found == [2, 1]


def test_weights_of_one_model_alone_are_not_shared() -> None:
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert shared_weights({0: first, 1: second}) == {}
    second.weight = first.weight
    assert shared_weights({0: first, 3: second, 4: torch.nn.Linear(2, 2)}) == {first.weight.data_ptr(): {0, 3}}


def test_several_threads_may_call_at_once(bundle_of: Callable[..., Path]) -> None:
    bundle = open_bundle(bundle_of("vit", **FORMS["auto"]))
    runtime, inputs = bundle.runtime(weights="packed"), inputs_of("vit")
    expected = [output.logits for output in bundle.runtime(weights="packed")(inputs, BATCH)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: runtime(inputs, BATCH), range(8)):
            assert all(torch.equal(one.logits, other) for one, other in zip(found, expected))
