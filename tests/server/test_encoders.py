"""Embeddings, CLIP and Whisper over HTTP are what the offline models give, and what they do not take is refused."""

import base64
import io
import json
import shutil
import struct
import wave
from itertools import product

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import normalize

from flexmerge_cli import open_bundle
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.kinds.images import pixels_of_array
from flexmerge_cli.server.encoders import POOLINGS, TEXTS_AT_ONCE, Embeddings, ImagesAndTexts, pooled
from flexmerge_cli.server.refusal import Refusal
from flexmerge_cli.server.run import ServerSettings, make_service
from flexmerge_cli.server.speech import samples_of

from ..evaluation import tiny
from ..evaluation.tiny import WORDS, sentences
from .offline import Offline
from .test_predict import CLOSE, outputs, predict, refused


def embedded(client, task, texts, **more):
    return client.post("/v1/embeddings", json={"model": task, "input": texts, **more})


@pytest.mark.parametrize("name", ["sentences", "encoders"])
def test_a_text_is_embedded_as_sentence_transformers_do_or_by_the_mean_of_its_tokens(client_of, bundle_of, name):
    client, texts = client_of(name), sentences(9, seed=3)
    for task in ("one", "two"):
        offline = Offline(bundle_of(name), task)
        found = [answer["embedding"] for answer in outputs(client, task, texts)]
        for text, row in zip(texts, found, strict=True):
            with torch.inference_mode():
                states = offline.model(**offline.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            expected = normalize(states[0], dim=0) if name == "sentences" else states.mean(0)
            assert torch.allclose(torch.tensor(row), expected, **CLOSE)
        answer = embedded(client, task, texts).json()
        assert np.allclose([one["embedding"] for one in answer["data"]], found, atol=1e-5)
        assert [one["index"] for one in answer["data"]] == list(range(9))
        assert answer["usage"]["prompt_tokens"] == sum(len(offline.tokenizer(text)["input_ids"]) for text in texts)
    packed = embedded(client, "one", texts[0], encoding_format="base64").json()["data"][0]["embedding"]
    row = outputs(client, "one", texts[:1])[0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(packed), "<f4"), row, atol=1e-5)


def test_embeddings_are_those_of_sentence_transformers_itself(bundle_of, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    parts = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    base, texts = str(bundle_of("encoders") / "tasks/one"), sentences(9, seed=3)

    def saved(name, pooling, *more):
        modules = [parts.Transformer(base), parts.Pooling(tiny.WIDTH, pooling), *more]
        library.SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / name))
        return tmp_path / name

    for key, pooling in POOLINGS.items():
        side = saved(pooling, pooling, *([parts.Normalize()] if pooling in ("cls", "max") else []))
        expected = library.SentenceTransformer(str(side), device="cpu").encode(texts)
        for config in (None, {"word_embedding_dimension": tiny.WIDTH, f"pooling_mode_{key}": True}):  # older versions
            if config is not None:
                (side / "1_Pooling/config.json").write_text(json.dumps(config))
            task, found = Embeddings("one", side), {}
            with torch.inference_mode():
                items = [task.prepare(text) for text in texts]
                task.run(transformers.AutoModel.from_pretrained(side).eval(), items, found.__setitem__)
            assert np.allclose([found[place]["embedding"] for place in range(9)], expected, atol=1e-6)
    for place, pooling in enumerate(("weightedmean", "mean_sqrt_len_tokens", ("cls", "mean"))):
        with pytest.raises(UsageError, match="Pooling"):
            Embeddings("one", saved(str(place), pooling))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "lasttoken"])
def test_padding_has_no_part_in_what_is_pooled(pooling, side):
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, 5, 1)
    for row, length in enumerate((5, 2, 1)):
        mask[row, slice(0, length) if side == "right" else slice(5 - length, 5)] = 1
    found = pooled(states, mask, pooling)
    for row, length in enumerate((5, 2, 1)):
        alone = states[row, :length] if side == "right" else states[row, 5 - length :]
        expected = {"cls": alone[0], "mean": alone.mean(0), "max": alone.amax(0), "lasttoken": alone[-1]}[pooling]
        assert torch.allclose(found[row], expected)


def test_modules_that_compute_more_than_a_pooling_are_refused_before_anything_is_loaded(bundle_of, tmp_path):
    for number, (modules, pooling, says) in enumerate(
        [
            ('[{"type": "a.Transformer"}, {"type": "a.Pooling"}, {"type": "a.Dense"}]', "{}", "Dense"),
            ('[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "1_Pooling"}]', "{}", "Pooling"),
            ('[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "1_Pooling"}]', '{"pooling_mode_cls_token": '
             'true, "pooling_mode_mean_tokens": true}', "Pooling"),
            ("nonsense", "{}", "modules.json"),
        ]
    ):  # fmt: skip
        side = tmp_path / str(number)
        shutil.copytree(bundle_of("sentences") / "tasks/one", side)
        (side / "modules.json").write_text(modules)
        (side / "1_Pooling/config.json").write_text(pooling)
        with pytest.raises(UsageError, match=says):
            Embeddings("one", side)


@pytest.mark.parametrize(
    ("file", "config", "says"),
    [
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("sentence_bert_config.json", {"max_seq_length": "many"}, "max_seq_length"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "red "}, "default_prompt_name": "query"},
            "`query`",
        ),
    ],
)
def test_settings_that_change_the_texts_are_refused_before_anything_is_loaded(bundle_of, tmp_path, file, config, says):
    side = shutil.copytree(bundle_of("sentences") / "tasks/one", tmp_path / "side")
    (side / file).write_text(json.dumps(config))
    with pytest.raises(UsageError, match=says) as caught:
        Embeddings("one", side)
    assert "--tasks" in caught.value.hint


def test_the_smaller_of_the_limits_of_tokens_counts_and_prompts_that_are_not_the_default_do_not(bundle_of, tmp_path):
    side = shutil.copytree(bundle_of("sentences") / "tasks/one", tmp_path / "side")
    usual = Embeddings("one", side).tokens.longest
    prompts = {"prompts": {"query": "red ", "document": ""}}
    for limit, name, expected in ((4, None, 4), (usual + 1, "document", usual), (None, None, usual)):
        config = {"max_seq_length": limit, "do_lower_case": False}
        (side / "sentence_bert_config.json").write_text(json.dumps(config))
        (side / "config_sentence_transformers.json").write_text(json.dumps(prompts | {"default_prompt_name": name}))
        assert Embeddings("one", side).tokens.longest == expected
    (side / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 4}))
    task = Embeddings("one", side)
    assert len(task.prepare("red green")["input_ids"]) == 4
    with pytest.raises(Refusal, match="5 tokens, and task `one` takes 4"):
        task.prepare("red green blue")


def test_what_is_no_text_and_what_embeds_no_texts_is_refused(client_of):
    client = client_of("encoders")
    refused(predict(client, "one", [3]), 400, "an input is a text")
    refused(predict(client, "one", ["red"], max_tokens=3), 400, "max_tokens")
    refused(embedded(client, "nobody", "red"), 404, "no task")
    refused(embedded(client, "one", []), 400, "input")
    refused(embedded(client, "one", "red", dimensions=3), 400, "dimensions")
    refused(embedded(client_of("images"), "cats", "red"), 400, "image-classification")


def pixels(seed, side=8):
    return np.random.default_rng(seed).integers(0, 256, (3, side, side))


def test_images_are_compared_with_texts_as_clip_does(client_of, bundle_of):
    client, asked = client_of("clip", max_wait=0.02), []
    for number in range(5):
        asked.append({"image": pixels(number).tolist(), "texts": sentences(1 + number, seed=number)})
    for task in ("pets", "cars"):
        offline, folder = Offline(bundle_of("clip"), task), bundle_of("clip") / "tasks" / task
        for one, answer in zip(asked, outputs(client, task, asked), strict=True):
            inputs = offline.tokenizer(one["texts"], padding=True, return_tensors="pt")
            with torch.inference_mode():
                logits = offline.model(
                    pixel_values=pixels_of_array(np.array([one["image"]]), folder),
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                ).logits_per_image[0]  # fmt: skip
            assert torch.allclose(torch.tensor(answer["scores"]), logits.softmax(-1), **CLOSE)
            assert answer["label"] == one["texts"][answer["index"]] and answer["score"] == max(answer["scores"])
    for wrong in ("red", {"image": asked[0]["image"]}, asked[0] | {"texts": []}, asked[0] | {"texts": [3]}):
        refused(predict(client, "pets", [wrong]), 400, "an `image`, and `texts`")
    refused(predict(client, "pets", [asked[0] | {"image": pixels(1, 4).tolist()}]), 400, "an image of [3, 4, 4]")


def test_texts_of_images_run_in_chunks_and_each_once(bundle_of):
    folder, model = bundle_of("clip") / "tasks/pets", open_bundle(bundle_of("clip")).model("pets")
    task, texts = ImagesAndTexts("pets", folder), [" ".join(words) for words in product(WORDS[:4], repeat=3)]
    lists = texts, texts[::-1], texts[:3]
    items = [task.prepare({"image": pixels(n).tolist(), "texts": own}) for n, own in enumerate(lists)]
    found, sizes = {}, []
    with torch.inference_mode():
        inputs = task.tokens.tokenizer(texts, padding=True, return_tensors="pt")
        logits = model(
            pixel_values=torch.cat([item[0] for item in items]),
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
        ).logits_per_image  # fmt: skip
        model.text_model.register_forward_pre_hook(
            lambda _module, _args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
        )
        task.run(model, items, found.__setitem__)
    assert sum(sizes) == len(texts) > max(sizes) == TEXTS_AT_ONCE
    for number, expected in enumerate((logits[0], logits[1].flip(0), logits[2, :3])):
        assert torch.allclose(torch.tensor(found[number]["scores"]), expected.softmax(-1), **CLOSE)


def test_a_vision_tower_gives_the_projection_of_an_image(client_of, bundle_of):
    client, offline = client_of("vision"), open_bundle(bundle_of("vision")).model("pets")
    for number, answer in enumerate(outputs(client, "pets", [pixels(n).tolist() for n in range(3)])):
        with torch.inference_mode():
            found = offline(pixel_values=pixels_of_array(pixels(number)[None], bundle_of("vision") / "tasks/pets"))
        assert torch.allclose(torch.tensor(answer["embedding"]), normalize(found.image_embeds[0], dim=0), **CLOSE)


def recording(values, width=2, rate=16000, channels=1):
    """The bytes of a WAV file of whole numbers [n, channels]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as made:
        made.setnchannels(channels)
        made.setsampwidth(width)
        made.setframerate(rate)
        data = np.asarray(values).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width]
        made.writeframes(((data.astype(int) + 128) % 256).astype(np.uint8).tobytes() if width == 1 else data.tobytes())
    return file.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_every_width_are_read_and_channels_averaged(width):
    top = 1 << (8 * width - 1)
    values = np.array([[0, top // 2], [-top, -top], [top - 1, 0]])
    found = samples_of(recording(values, width, channels=2), 16000)
    assert np.allclose(found, values.mean(1) / top, atol=1e-6)


@pytest.mark.parametrize("width", [5, 8, 16])
def test_samples_of_another_width_are_refused(width):
    data = bytearray(recording(np.zeros((80, 1))))
    data[32:36] = struct.pack("<HH", width, 8 * width)  # the bytes of a frame, and the bits of a sample
    with pytest.raises(Refusal, match=f"{8 * width} bits"):
        samples_of(bytes(data), 16000)


def test_recordings_are_recognised_as_offline(client_of, bundle_of):
    from transformers import AutoFeatureExtractor

    client, rng = client_of("whisper", max_wait=0.02), np.random.default_rng(1)
    sounds = [rng.integers(-20000, 20000, (int(rng.integers(2000, 16000)), 1)) for _ in range(4)]
    files = [base64.b64encode(recording(sound)).decode() for sound in sounds]
    for task in ("calls", "songs"):
        folder, offline = bundle_of("whisper") / "tasks" / task, Offline(bundle_of("whisper"), task)
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        for sound, answer in zip(sounds, outputs(client, task, files, max_tokens=6), strict=True):
            features = extractor(sound[:, 0] / 32768, sampling_rate=16000, return_tensors="pt")["input_features"]
            made = offline.model.generate(input_features=features, max_new_tokens=6, do_sample=False)
            assert answer["text"] == offline.tokenizer.batch_decode(made, skip_special_tokens=True)[0].strip()
            assert answer["text"]
    refused(predict(client, "calls", [3]), 400, "WAV")
    refused(predict(client, "calls", ["%%"]), 400, "base64")
    refused(predict(client, "calls", [base64.b64encode(b"RIFFxxxx").decode()]), 400, "WAV")
    wrong = base64.b64encode(recording(sounds[0], rate=8000)).decode()
    refused(predict(client, "calls", [wrong]), 400, "8000 samples a second", "16000")
    long = base64.b64encode(recording(np.zeros((16001, 1)))).decode()
    refused(predict(client, "calls", [long]), 400, "at most 1")
    refused(predict(client, "calls", files[:1], max_tokens=999), 400, "max_tokens is 999")


def test_odd_settings_of_a_checkpoint_of_speech_are_passed_over_or_refused(bundle_of):
    service = make_service(open_bundle(bundle_of("whisper"))._bundle, ServerSettings(tasks=("calls",)))
    task, model = service.tasks["calls"], service.worker._runtime.model("calls")
    item, said = task.prepare(base64.b64encode(recording(np.ones((9000, 1)))).decode(), max_tokens=3), []
    for key, value in {
        "do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True, "prompt_lookup_num_tokens": 2,
    }.items():  # fmt: skip
        setattr(model.generation_config, key, value)
    task.meet(model)
    task.run(model, [item], lambda number, answer: said.append((number, answer)))
    assert [number for number, _ in said] == [0]
    model.generation_config.stop_strings = ["red"]
    with pytest.raises(UsageError, match="has `stop_strings`, which is not served"):
        task.meet(model)
