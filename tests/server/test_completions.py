"""Completions and chats are what the offline model generates, whole and streamed, alone and in a batch of others."""

import asyncio
import gc
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flexmerge_cli import open_bundle
from flexmerge_cli.errors import UsageError
from flexmerge_cli.server.app import make_app
from flexmerge_cli.server.generation import Choice, generate
from flexmerge_cli.server.run import ServerSettings, make_service
from flexmerge_cli.server.worker import Row

from ..evaluation.tiny import LENGTH, WORDS, sentences
from .offline import Offline
from .test_predict import refused

LANGUAGES = ("code", "prose", "verse", "talk")


def complete(client, model, prompt, **more):
    return client.post("/v1/completions", json={"model": model, "prompt": prompt, "temperature": 0, **more})


def completed(client, model, prompt, **more):
    answer = complete(client, model, prompt, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(answer):
    """The JSON of every event but the last, which says that it is."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *sent, last, rest = answer.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in sent]


@pytest.mark.parametrize(("name", "tasks"), [("mixed", LANGUAGES), ("gpt2", ("first", "second"))])
def test_texts_of_many_clients_are_those_of_offline_models(client_of, bundle_of, name, tasks):
    client = client_of(name, max_wait=0.02)
    offline = {task: Offline(bundle_of(name), task) for task in tasks}
    asked = [
        (tasks[number % len(tasks)], text, 1 + number % 15) for number, text in enumerate(sentences(24, seed=len(name)))
    ]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda one: completed(client, one[0], one[1], max_tokens=one[2]), asked))
    for answer, (task, prompt, max_tokens) in zip(found, asked, strict=True):
        text, count, finish = offline[task].completion(prompt, max_tokens)
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text, finish)
        prompt_tokens = len(offline[task].tokenizer(prompt)["input_ids"])
        assert answer["usage"] == {
            "prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count,
        }  # fmt: skip
        assert (answer["object"], answer["model"]) == ("text_completion", task)


def test_prompts_may_be_several_and_tokens(client_of, bundle_of):
    client, offline = client_of("mixed"), Offline(bundle_of("mixed"), "prose")
    prompts = sentences(3, seed=8)
    ids = [offline.tokenizer(prompt)["input_ids"] for prompt in prompts]
    expected = [offline.completion(prompt, 16)[0] for prompt in prompts]
    for given in (prompts, ids):
        answer = completed(client, "prose", given)
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert completed(client, "prose", ids[0])["choices"][0]["text"] == expected[0]


def test_a_seed_decides_what_is_drawn_whatever_else_is_in_the_batch(client_of, bundle_of):
    client, offline = client_of("mixed", max_wait=0.05), Offline(bundle_of("mixed"), "code")
    prompt = "red is not the"
    asked = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 10}
    expected = [offline.drawn(prompt, 10, seed, 1.5, 0.9) for seed in (7, 8, 9)]
    assert len(set(expected)) == 3
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(completed, client, "code", text, temperature=1) for text in sentences(6)]
        answer = completed(client, "code", prompt, seed=7, n=3, **asked)
        assert all(other.result()["choices"] for other in others)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert answer["usage"]["prompt_tokens"] == len(offline.tokenizer(prompt)["input_ids"])
    unseeded = {completed(client, "code", prompt, **asked)["choices"][0]["text"] for _ in range(8)}
    assert len(unseeded) > 1
    almost_greedy = completed(client, "code", prompt, temperature=1e-300, max_tokens=10)
    assert almost_greedy["choices"] == completed(client, "code", prompt, max_tokens=10)["choices"]


def test_a_text_ends_before_the_first_stop(client_of):
    client = client_of("mixed")
    whole = completed(client, "prose", "one two", max_tokens=12)["choices"][0]["text"]
    words = whole.split()
    stop = words[len(words) // 2]
    for given in (stop, ["no such word", stop]):
        choice = completed(client, "prose", "one two", max_tokens=12, stop=given)["choices"][0]
        assert choice == {
            "index": 0, "text": whole[: whole.index(stop)], "logprobs": None, "finish_reason": "stop",
        }  # fmt: skip
        streamed = events(complete(client, "prose", "one two", max_tokens=12, stop=given, stream=True))
        assert "".join(event["choices"][0]["text"] for event in streamed) == choice["text"]


def test_a_stream_is_the_whole_text_in_pieces(client_of):
    client = client_of("mixed")
    asked = {"n": 2, "seed": 3, "temperature": 1.2, "max_tokens": 9}
    whole = completed(client, "verse", ["red", "blue is"], **asked)
    sent = events(
        complete(client, "verse", ["red", "blue is"], stream=True, stream_options={"include_usage": True}, **asked)
    )
    usage = sent.pop()
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert {event["id"] for event in sent} == {usage["id"]}
    for choice in whole["choices"]:
        own = [event["choices"][0] for event in sent if event["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert len(own) > 2


def chat(client, content, **more):
    messages = [{"role": "system", "content": "yes"}, {"role": "user", "content": content}]
    body = {"model": "talk", "messages": messages, "temperature": 0, "max_completion_tokens": 6, **more}
    return client.post("/v1/chat/completions", json=body)


def test_a_chat_is_rendered_by_the_tasks_template(client_of, bundle_of):
    client, offline = client_of("mixed"), Offline(bundle_of("mixed"), "talk")
    prompt = "yes is red one is "
    ids = torch.tensor([offline.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    made = offline.model.generate(ids, max_new_tokens=6, do_sample=False)[0]
    text = offline.tokenizer.decode(made, skip_special_tokens=True)[len(prompt) - 1 :]
    for content in ("red one", [{"type": "text", "text": "red "}, {"type": "text", "text": "one"}]):
        answer = chat(client, content).json()
        assert answer["object"] == "chat.completion"
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}
        assert answer["usage"]["prompt_tokens"] == ids.shape[1]
    sent = events(chat(client, "red one", stream=True))
    assert {event["object"] for event in sent} == {"chat.completion.chunk"}
    first, *rest = (event["choices"][0]["delta"] for event in sent)
    assert first == {"role": "assistant", "content": ""}
    assert rest.pop() == {}
    assert "".join(delta["content"] for delta in rest) == text
    # Without a limit of its own it may take all that is left of the model's positions.
    most = LENGTH - ids.shape[1]
    found = chat(client, "red one", max_completion_tokens=None).json()
    assert found["usage"]["completion_tokens"] == most or found["choices"][0]["finish_reason"] == "stop"


def test_what_is_not_supported_or_out_of_range_is_told(client_of):
    client = client_of("mixed", max_tokens=20, max_queue=10)
    assert refused(complete(client, "nobody", "red"), 404, "no task `nobody`", "code")["param"] == "model"
    refused(complete(client, "mood", "red"), 400, "/v1/tasks/mood/predict")
    refused(client.post("/v1/tasks/code/predict", json={"inputs": ["red"]}), 400, "/v1/completions")
    for key, value in {
        "logprobs": 0, "echo": True, "frequency_penalty": 0.5, "logit_bias": {"3": 1}, "best_of": 2, "suffix": "x",
        "temprature": 1,
    }.items():  # fmt: skip
        assert refused(complete(client, "code", "red", **{key: value}), 400, key, "not supported")["param"] == key
    for key, value in {
        "temperature": -1, "top_p": 0, "n": 0, "max_tokens": 0, "stop": ["a"] * 5, "seed": 1.5, "stream": "yes",
        "prompt": [], "model": 3,
    }.items():  # fmt: skip
        assert refused(complete(client, **{"model": "code", "prompt": "red", key: value}), 400, key)["param"] == key
    refused(complete(client, "code", [[1], []]), 400, "prompt")
    refused(complete(client, "code", [1, 999]), 400, "token 999", "27")
    refused(complete(client, "code", [-1]), 400, "prompt")
    refused(complete(client, "code", "red", max_tokens=21), 400, "max_tokens is 21", "20")
    refused(complete(client, "code", " ".join(WORDS[:20]), max_tokens=9), 400, "leaves 3", "max_tokens is 9")
    refused(complete(client, "code", " ".join(WORDS * 2)), 400, "takes 24")
    refused(complete(client, "code", ["red"] * 6, n=2), 400, "at most 10")
    neutral = {"logprobs": None, "echo": False, "frequency_penalty": 0.0, "best_of": 1, "user": "me", "stop": None}
    assert complete(client, "code", "red", **neutral).status_code == 200
    neutral = {
        "tool_choice": "auto", "parallel_tool_calls": False, "top_logprobs": 0, "modalities": ["text"], "metadata": {},
        "service_tier": "auto", "safety_identifier": "me", "prompt_cache_key": "a", "functions": [],
        "stream_options": {"include_obfuscation": False},
    }  # fmt: skip
    said = {"role": "assistant", "content": "one", "refusal": None, "annotations": [], "tool_calls": []}
    assert chat(client, "red", messages=[said], **neutral).status_code == 200
    refused(chat(client, "red", tool_choice="required"), 400, "tool_choice", "not supported")
    refused(chat(client, "red", messages=[said | {"tool_calls": [{}]}]), 400, "tool_calls", "not supported")
    refused(client.post("/v1/chat/completions", json={"model": "code", "messages": []}), 400, "messages")
    image = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    nothing = [{"type": "text"}]
    types = "it must be a valid string or it must be a valid list"
    assert refused(chat(client, image), 400, "messages.1.content.0.type: it must be 'text'")["param"] == "messages"
    refused(chat(client, nothing), 400, "messages.1.content.0.text: it is required")
    refused(chat(client, 3), 400, f"messages.1.content: {types}")
    refused(complete(client, "code", 3), 400, f"prompt: {types}")
    refused(complete(client, "code", []), 400, "it must be a valid string or it must have at least 1 item")
    refused(complete(client, "code", ["red", 3]), 400, "prompt.1: it must be a valid string")
    refused(complete(client, "code", "red", stop=["a", ""]), 400, "stop.1: it must have at least 1 character")
    refused(chat(client, "red", tools=[{"type": "function"}]), 400, "tools", "not supported")
    refused(chat(client, "red", model="code"), 400, "no chat template")
    # A stream is refused with a status, too.
    refused(complete(client, "code", "red", max_tokens=21, stream=True), 400)
    refused(complete(client, "code", ["red"] * 11, stream=True), 400)


@pytest.mark.parametrize(
    ("name", "leaves_at", "stream"),
    [
        *itertools.product(
            ["/v1/completions", "/v1/chat/completions"], ["once it has asked", "at the first message"], [True]
        ),
        ("/v1/completions", "once it has asked", False),
    ],
)
def test_nothing_is_computed_nor_logged_of_a_client_that_leaves_before_its_answer(
    bundle_of, name, leaves_at, stream, caplog
):
    """The worker is not started, so that all that was asked waits."""
    service = make_service(open_bundle(bundle_of("mixed"))._bundle, ServerSettings())
    asked = {"prompt": ["red"]} if name == "/v1/completions" else {"messages": [{"role": "user", "content": "red"}]}
    body = json.dumps({"model": "talk", "stream": stream, **asked}).encode()
    messages = [{"type": "http.request", "body": body}]
    scope = {
        "type": "http", "method": "POST", "path": name, "raw_path": name.encode(), "query_string": b"",
        "scheme": "http", "headers": [(b"content-type", b"application/json")], "client": ("x", 1),
        "server": ("x", 2), "asgi": {"spec_version": "2.3"}, "http_version": "1.1",
    }  # fmt: skip

    async def ask():
        begun = asyncio.Event()

        async def receive():
            if messages:
                return messages.pop()
            if leaves_at == "at the first message":
                await begun.wait()
            return {"type": "http.disconnect"}

        async def send(_message):
            begun.set()
            await asyncio.sleep(0)

        await asyncio.wait_for(make_app(service)(scope, receive, send), 30)

    asyncio.run(ask())
    rows = service.worker._waiting
    assert rows and all(row.answer.cancelled() and row.item.is_cancelled for row in rows)
    gc.collect()
    assert not caplog.records


@pytest.mark.parametrize("short", ["code", "verse", "mood"])
@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_what_is_asked_while_a_text_is_generated_joins_it_at_the_next_token(bundle_of, short, weights):
    service = make_service(open_bundle(bundle_of("mixed"))._bundle, ServerSettings(weights=weights, max_wait=0))
    offline, worker, order = Offline(bundle_of("mixed"), short), service.worker, []
    rows = {}

    def asked(name, item):
        rows[name] = Row(task=short if name == "short" else "code", item=item)
        rows[name].answer.add_done_callback(lambda _answer: order.append(name))
        worker.submit([rows[name]])

    def on_text(_text):
        if "short" not in rows:
            task = service.tasks[short]
            asked("short", task.prepare("red is") if short == "mood" else task.choices(
                task.prompt("red is"), 1, max_tokens=3, usual=3)[0])  # fmt: skip

    long = service.tasks["code"].choices(service.tasks["code"].prompt("red"), 1, max_tokens=18, usual=1)[0]
    long.on_text = on_text
    worker.start()
    asked("long", long)
    found = rows["long"].answer.result(30)
    answer = rows["short"].answer.result(30)
    worker.stop(10)
    assert order == ["short", "long"]
    expected = Offline(bundle_of("mixed"), "code").completion("red", 18)
    assert (found.text, len(found.tokens), found.finish) == expected
    if short == "mood":
        scores = offline.logits("red is").softmax(-1)
        assert torch.allclose(torch.tensor(answer["scores"]), scores, atol=1e-5)
    else:
        assert (answer.text, len(answer.tokens), answer.finish) == offline.completion("red is", 3)


def test_no_more_join_than_a_batch_has_room_for(bundle_of):
    service = make_service(open_bundle(bundle_of("gpt2"))._bundle, ServerSettings(max_batch=2, max_wait=0))
    task, worker, most = service.tasks["first"], service.worker, []

    def choice(count):
        made = Choice(prompt=[5, 6], max_tokens=count)
        made.on_text = lambda _text: most.append(sum(not row.answer.done() for row in worker._running))
        return Row(task=task.name, item=made)

    rows = [choice(1 + number) for number in range(8)]
    worker.start()
    for row in rows:
        worker.submit([row])
    assert [len(row.answer.result(30).tokens) for row in rows] == [1 + number for number in range(8)]
    worker.stop(10)
    assert max(most) == 2


def test_what_nobody_waits_for_ends(bundle_of):
    offline = Offline(bundle_of("gpt2"), "first")
    choices = [Choice(prompt=[5, 6], max_tokens=20) for _ in range(2)]
    choices[0].on_text = lambda _text: setattr(choices[0], "is_cancelled", True)
    ended = []
    generate(offline.model, offline.tokenizer, choices, ended.append)
    assert choices[0].finish == "cancelled"
    assert len(choices[0].tokens) < len(choices[1].tokens)
    assert ended == [0, 1]


def test_settings_of_a_checkpoint_that_count_tokens_do_not_depend_on_padding_or_on_the_batch(bundle_of):
    """A least length counts the tokens that pad a prompt, too, and the last token is forced at the batch's limit."""
    service = make_service(open_bundle(bundle_of("gpt2"))._bundle, ServerSettings())
    task, model = service.tasks["first"], service.worker._runtime.model("first")

    def texts(batches_of):
        rows = [[4 + number % 9] * (1 + number % 4) for number in range(12)]
        choices = [Choice(prompt=row, max_tokens=5 + len(row) % 2) for row in rows]
        for batch in batches_of(choices):
            task.run(model, batch, lambda *_answer: None)
        return [choice.tokens for choice in choices]

    def alone(choices):
        return [[choice] for choice in choices]

    assert len(task.batches([Choice(prompt=[5] * count, max_tokens=count) for count in (1, 2, 3)])) == 1
    for setting, value in {"repetition_penalty": 2.0, "min_length": 6, "forced_eos_token_id": 3}.items():
        setattr(model.generation_config, setting, value)
    task.meet(model)
    assert texts(task.batches) == texts(alone)
    assert texts(lambda choices: [choices]) != texts(alone)


def test_odd_settings_of_a_checkpoint_are_passed_over_or_refused(
    bundle_of,
):
    service = make_service(open_bundle(bundle_of("gpt2"))._bundle, ServerSettings())
    task, model = service.tasks["first"], service.worker._runtime.model("first")
    choices = [Choice(prompt=[5] * count, max_tokens=count) for count in (1, 2)]
    for key, value in {
        "pad_token_id": -1, "do_sample": True, "num_return_sequences": 2, "prompt_lookup_num_tokens": 2,
    }.items():  # fmt: skip
        setattr(model.generation_config, key, value)
    task.meet(model)
    task.run(model, choices, lambda *_answer: None)
    assert [len(choice.tokens) for choice in choices] == [1, 2]
    model.generation_config.stop_strings = ["red"]
    with pytest.raises(UsageError, match="has `stop_strings`, which is not served"):
        task.meet(model)
