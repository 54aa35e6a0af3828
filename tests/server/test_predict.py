"""Predictions over HTTP are those of the offline models, and what cannot be answered is refused with its reason."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from flexmerge_cli import open_bundle
from flexmerge_cli.evaluation.kinds.images import image_processor, pixels_of, pixels_of_array
from flexmerge_cli.server.refusal import Refusal
from flexmerge_cli.server.run import ServerSettings, make_service
from flexmerge_cli.server.tasks import TaskTokens

from ..evaluation.tiny import WORDS, sentences
from .offline import Offline

CLOSE = {"rtol": 0, "atol": 1e-5}


def predict(client, task, inputs, **more):
    return client.post(f"/v1/tasks/{task}/predict", json={"inputs": inputs, **more})


def outputs(client, task, inputs, **more):
    answer = predict(client, task, inputs, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()["outputs"]


def refused(answer, status, *says):
    """An error in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in says:
        assert word in error["message"], error
    return error


def test_texts_and_pairs_are_classified_as_offline(client_of, bundle_of):
    client, bundle = client_of("texts"), bundle_of("texts")
    texts = sentences(5, seed=1)
    for task, count in (("two", 2), ("three", 3)):
        found = outputs(client, task, [*texts, ["red is", "blue"]])
        offline = Offline(bundle, task)
        expected = [*map(offline.logits, texts), offline.logits("red is", "blue")]
        for output, logits in zip(found, expected, strict=True):
            scores = logits.softmax(-1)
            assert len(output["scores"]) == count
            np.testing.assert_allclose(output["scores"], scores, **CLOSE)
            assert output["index"] == int(scores.argmax())
            assert output["label"] == f"LABEL_{output['index']}"
            assert output["score"] == max(output["scores"])


def test_a_head_of_one_output_gives_a_number(client_of, bundle_of):
    found = outputs(client_of("texts"), "grade", ["red is not blue"])
    expected = Offline(bundle_of("texts"), "grade").logits("red is not blue")
    np.testing.assert_allclose(found[0]["value"], expected[0], **CLOSE)


def test_images_come_as_pixels_or_as_pictures(client_of, bundle_of):
    client, bundle = client_of("images"), bundle_of("images")
    side, model = bundle / "tasks" / "dogs", open_bundle(bundle).model("dogs")
    drawn = np.random.default_rng(0).integers(0, 256, (20, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(drawn).save(file, "png")
    text = base64.b64encode(file.getvalue()).decode()
    array = drawn[:8, :8].transpose(2, 0, 1)
    pixels = [pixels_of(image_processor(side), [file.getvalue()]), pixels_of_array(array[None], side)]
    found = outputs(client, "dogs", [text, f"data:image/png;base64,{text}", array.tolist()])
    for output, own in zip(found, [pixels[0], *pixels], strict=True):
        with torch.inference_mode():
            np.testing.assert_allclose(output["scores"], model(own).logits[0].softmax(-1), **CLOSE)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("no picture", "base64"),
        (base64.b64encode(b"text").decode(), "not a valid picture"),
        ([[[1, 2], [3]]], "numbers [channels, height, width]"),
        ([[["a"]]], "numbers"),
        ([], "numbers"),
        (True, "numbers"),
        ({"bytes": ""}, "numbers"),
        ([[[10**400]]], "numbers"),
        (np.zeros((3, 4, 4)).tolist(), "the model takes [3, 8, 8]"),
        (np.zeros((1, 8, 8)).tolist(), "the model takes [3, 8, 8]"),
    ],
)
def test_what_is_no_image_of_the_model_is_refused(client_of, image, says):
    refused(predict(client_of("images"), "cats", [image]), 400, says)


def test_numbers_that_are_not_finite_are_refused(client_of):
    client = client_of("images")
    for number in ("NaN", "Infinity", "1e999"):
        image = json.dumps(np.zeros((3, 8, 8)).tolist()).replace("0.0", number, 1)
        answer = client.post(
            "/v1/tasks/cats/predict", content=f'{{"inputs": [{image}]}}', headers={"Content-Type": "application/json"}
        )
        refused(answer, 400, "not finite")


def test_texts_are_generated_as_offline(client_of, bundle_of):
    client, bundle = client_of("t5"), bundle_of("t5")
    texts = sentences(4, seed=2)
    for task in ("sums", "words"):
        found = outputs(client, task, texts, max_tokens=7)
        tokenizer, model = AutoTokenizer.from_pretrained(bundle / "tasks" / task), open_bundle(bundle).model(task)
        for output, text in zip(found, texts, strict=True):
            made = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=7, do_sample=False)
            assert output["text"] == tokenizer.decode(made[0], skip_special_tokens=True)
            assert output["tokens"] == len(made[0]) - 1  # without the token that decoders start with
            assert output["finish_reason"] == ("stop" if made[0][-1] == model.config.eos_token_id else "length")


def test_many_clients_at_once_get_their_own_answers_in_few_batches(client_of):
    client = client_of("texts", max_wait=0.02)
    asked = [(("two", "three", "grade")[number % 3], text) for number, text in enumerate(sentences(60, seed=3))]
    alone = [outputs(client, task, [text])[0] for task, text in asked]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda one: outputs(client, one[0], [one[1]])[0], asked))
    for first, second in zip(alone, together, strict=True):
        assert first.keys() == second.keys()
        for key in first:
            if isinstance(first[key], str):
                assert first[key] == second[key]
            else:
                np.testing.assert_allclose(first[key], second[key], **CLOSE)


def test_models_are_listed_with_their_kind_and_labels(client_of):
    client = client_of("texts")
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert {one["id"]: one["kind"] for one in listed["data"]} == {
        "two": "text-classification", "three": "text-classification", "grade": "regression",
    }  # fmt: skip
    assert client.get("/v1/models/two").json()["labels"] == ["LABEL_0", "LABEL_1"]
    assert client.get("/health").json() == {"status": "ok", "tasks": 3, "waiting": 0}
    assert client_of("texts", tasks=["two"]).get("/health").json()["tasks"] == 1


def test_what_is_asked_wrongly_is_told(client_of):
    client = client_of("texts", max_body=2000, max_queue=8)
    error = refused(predict(client, "four", ["red"]), 404, "no task `four`", "two", "three", "grade")
    assert error["code"] == "model_not_found"
    refused(client.get("/nothing"), 404, "no route /nothing")
    refused(client.get("/v1/tasks/two/predict"), 405, "predict does not take GET")
    refused(predict(client, "two", []), 400, "inputs")
    refused(predict(client, "two", "red"), 400, "inputs", "list")
    refused(predict(client, "two", ["red"], temperature=1), 400, "temperature")
    refused(predict(client, "two", ["red"], max_tokens=1), 400, "max_tokens")
    refused(predict(client, "two", ["red"], max_tokens=True), 400, "max_tokens")
    refused(predict(client, "two", [3]), 400, "text")
    refused(predict(client, "two", [["a", "b", "c"]]), 400, "two texts")
    refused(predict(client, "two", ["red"] * 9), 400, "at most 8")
    refused(predict(client, "two", [" ".join(WORDS[:8] * 5)]), 400, "42 tokens", "takes 24")
    refused(predict(client, "two", ["red " * 900]), 413, "2,000 bytes")
    assert predict(client, "two", ["red"], max_tokens=None).status_code == 200


def test_a_text_with_a_token_that_the_model_has_no_row_for_is_refused(bundle_of):
    """A tokenizer may have more than the embeddings: such a text would fail, and others of its batch with it."""
    task = make_service(open_bundle(bundle_of("texts"))._bundle, ServerSettings()).tasks["two"]
    task.tokens.tokenizer.add_tokens(["zebra"])
    with pytest.raises(Refusal, match="token 27 is not one of the model's 27"):
        task.prepare("red zebra")
    for config in ({}, {"text_config": None}, {"text_config": []}, {"vocab_size": None}):
        assert TaskTokens("two", task.side, config).vocabulary == 27, "that of the tokenizer"
    assert TaskTokens("two", task.side, {"text_config": {"vocab_size": 9}}).vocabulary == 9


BODIES = {
    b"": "the body: it is required", b"{": "not valid JSON", b"[]": "the body: it must be a JSON object",
    b"3": "the body: it must be a JSON object", b"null": "the body: it must be a JSON object",
    b"\xff": "not UTF-8", b"[" * 200_000: "nested too deeply", b"9" * 5000: "too many digits",
    b'{"inputs": ["\\ud800"]}': "half of a surrogate pair",
    b"{}": "inputs: it is required", b'{"inputs": 3}': "inputs: it must be a valid list",
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_what_is_no_sound_body_is_refused(client_of, body):
    client = client_of("texts", max_body=200_000)
    headers = {"Content-Type": "application/json"}
    refused(client.post("/v1/tasks/two/predict", content=body, headers=headers), 400, BODIES[body])
    refused(client.post("/v1/tasks/two/predict", content=body), 415, "application/json")
    chunks = iter([b" " * 80_000] * 3)
    refused(client.post("/v1/tasks/two/predict", content=chunks, headers=headers), 413)
    assert client.get("/health").status_code == 200


def test_a_full_queue_says_when_to_come_again(client_of):
    client = client_of("texts", max_batch=1, max_wait=0, max_queue=2)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: predict(client, "two", ["red", "blue"]), range(40)))
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert refused(answer, 503, "waiting")["code"] == "overloaded"
            assert answer.headers["Retry-After"] == "1"


def test_a_model_that_fails_takes_no_other_task_with_it(client_of, monkeypatch):
    client = client_of("texts", max_wait=0.2)
    from flexmerge_cli.server.tasks import Texts

    answers = Texts.answers

    def failing(self, model, items):
        if self.name == "two":
            raise RuntimeError("/secret/path")
        return answers(self, model, items)

    monkeypatch.setattr(Texts, "answers", failing)
    with ThreadPoolExecutor(2) as pool:
        bad, good = pool.map(lambda task: predict(client, task, ["red"]), ["two", "three"])
    assert "secret" not in refused(bad, 500, "task `two`")["message"]
    assert good.status_code == 200


def test_metrics_count_requests_batches_and_bytes(client_of, bundle_of):
    client = client_of("texts")
    predict(client, "two", ["red", "blue"])
    predict(client, "nobody", ["red"])
    client.post("/secret")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    route = 'route="/v1/tasks/{name}/predict"'
    assert lines[f'flexmerge_requests_total{{{route},status="200"}}'] == "1.0"
    assert lines[f'flexmerge_requests_total{{{route},status="404"}}'] == "1.0"
    assert lines['flexmerge_requests_total{route="other",status="415"}'] == "1.0"
    assert lines[f"flexmerge_request_seconds_count{{{route}}}"] == "2.0"
    assert float(lines[f"flexmerge_request_seconds_sum{{{route}}}"]) > 0
    assert lines['flexmerge_inputs_total{task="two"}'] == "2.0"
    assert (lines["flexmerge_batch_inputs_count"], lines["flexmerge_batch_inputs_sum"]) == ("1.0", "2.0")
    assert lines["flexmerge_batch_tasks_sum"] == "1.0"
    assert lines["flexmerge_waiting_inputs"] == "0.0"
    num_bytes = open_bundle(bundle_of("texts")).runtime().num_bytes["cpu"]
    assert float(lines['flexmerge_resident_bytes{device="cpu"}']) == num_bytes
    assert float(lines["process_resident_memory_bytes"]) > num_bytes
    assert "nobody" not in answer.text and "secret" not in answer.text
