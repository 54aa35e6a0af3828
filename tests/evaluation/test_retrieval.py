"""`image-text-retrieval`: against a plain loop over all pairs, with CLIP models with and without a text tower."""

import json

import numpy as np
import pytest
import torch
import transformers

from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.scoring import Scorer

from . import tiny

SEED = 3  # of models that find some pairs and not others
N, PER_IMAGE = 9, (1, 3, 2, 1, 1, 2, 1, 3, 1)


@pytest.fixture(autouse=True)
def same_models():
    torch.manual_seed(SEED)


def images():
    return np.random.default_rng(0).integers(0, 256, (N, 3, 8, 8)).astype(np.uint8)


def captions():
    found = tiny.sentences(sum(PER_IMAGE), seed=1)
    return [[found.pop() for _ in range(count)] for count in PER_IMAGE]


def data(folder):
    from PIL import Image

    for number, image in enumerate(images()):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number}.png")
    texts = [of[0] if len(of) == 1 else of for of in captions()]
    tiny.rows(folder / "d.jsonl", image=[f"{n}.png" for n in range(N)], caption=texts)


def processor(folder):
    same = {"do_resize": False, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    config = {"image_processor_type": "CLIPImageProcessor", "rescale_factor": 1 / 255, **same}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def ranks(similarity, right):
    """For each query, how many wrong answers are before its best right one."""
    found = []
    for similar, own in zip(similarity, right):
        best = max(similar[own])
        found.append(sum(value > best for other, value in enumerate(similar) if other not in own))
    return found


def similarities(model, numbers, texts):
    """The cosines of some of the images with texts, [images, texts]."""
    tokenizer = tiny.tokenizer(start=True, end=True)
    with torch.inference_mode():
        seen, read = [], []
        for image in images()[list(numbers)]:
            pixels = torch.from_numpy((image / 255 - 0.5) / 0.25).float()[None]
            seen.append(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0])
        for text in texts:
            output = model.text_model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
            read.append(model.text_projection(output.pooler_output)[0])
    return np.array([[float(a @ b / a.norm() / b.norm()) for b in read] for a in seen])


@pytest.mark.parametrize("direction", ["image-to-text", "text-to-image"])
@pytest.mark.parametrize("encoder", ["CLIPModel", "CLIPVisionModel"])
def test_recall_equals_a_loop_over_all_pairs(tmp_path, encoder, direction):
    base, model = tiny.clip(tmp_path / "base"), tmp_path / "model"
    whole = transformers.CLIPModel.from_pretrained(base).eval()
    own = {"CLIPModel": whole, "CLIPVisionModel": whole.vision_model}[encoder]
    with torch.no_grad():
        for parameter in own.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    whole.save_pretrained(model)
    if encoder == "CLIPModel":
        tiny.tokenizer(start=True, end=True).save_pretrained(model)
    else:
        transformers.CLIPVisionModel.from_pretrained(model).save_pretrained(tmp_path / "encoder")
        model = tmp_path / "encoder"
    processor(model)
    data(tmp_path)
    task = {"kind": "image-text-retrieval", "data": "d.jsonl", "metric": ["recall@2", "recall@1", "recall@5"]}
    found = tiny.scored(model, task | {"direction": direction, "batch_size": 4}, base="base")
    similarity = similarities(whole, range(N), [text for of in captions() for text in of])
    owners = [number for number, count in enumerate(PER_IMAGE) for _ in range(count)]
    if direction == "image-to-text":
        wanted = ranks(similarity, [[t for t, owner in enumerate(owners) if owner == n] for n in range(N)])
    else:
        wanted = ranks(similarity.T, [[owner] for owner in owners])
    values = {scored.metric: scored.value for scored in (found, *found.others)}
    assert values == {f"recall@{k}": pytest.approx(np.mean([rank < k for rank in wanted])) for k in (2, 1, 5)}
    assert 0 < values["recall@1"] < values["recall@5"] < 1 and found.n == len(wanted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"columns": {"text": "words"}}, "no column `words`"),
        ({"metric": "accuracy"}, "no metric `accuracy`"),
        ({"metric": "recall@0"}, "no metric `recall@0`"),
        ({"direction": "both"}, "direction"),
        ({"data": "empty.jsonl"}, "row 2 of empty.jsonl is neither a text nor a list of texts"),
        ({"data": "lost.jsonl"}, "no picture at"),
        ({"text_model": "vit"}, "no text tower"),
    ],
)
def test_bad_input_is_refused_with_its_place(tmp_path, change, says):
    model = tiny.clip(tmp_path / "model")
    processor(model)
    tiny.vit(tmp_path / "vit")
    data(tmp_path)
    tiny.rows(tmp_path / "empty.jsonl", image=["0.png", "1.png"], text=["red", []])
    tiny.rows(tmp_path / "lost.jsonl", image=["0.png", "lost.png"], text=["red", "blue"])
    task = {"kind": "image-text-retrieval", "data": "d.jsonl"} | change
    with pytest.raises(UsageError, match=says):
        spec = tiny.spec_of(tmp_path, task)
        Scorer(spec=spec, device="cpu", cache=None).examples("it", model)


def test_one_pair_is_always_found(tmp_path):
    model = tiny.clip(tmp_path / "model")
    processor(model)
    data(tmp_path)
    task = {"kind": "image-text-retrieval", "data": "d.jsonl", "limit": 1}
    assert tiny.scored(model, task).value == 1


def test_an_image_with_most_of_the_texts_makes_the_others_no_easier_to_find(tmp_path):
    """Those with one text have 9 wrong ones, of which 5 may be better; the first image has only 2."""
    model = tiny.clip(tmp_path / "model")
    processor(model)
    data(tmp_path)
    texts = tiny.sentences(10, seed=1)
    tiny.rows(tmp_path / "d.jsonl", image=["0.png", "1.png", "2.png"], text=[texts[:8], texts[8], texts[9]])
    task = {"kind": "image-text-retrieval", "data": "d.jsonl", "metric": ["recall@5", "recall@8", "recall@100"]}
    found = tiny.scored(model, task)
    own = [[*range(8)], [8], [9]]
    similarity = similarities(transformers.CLIPModel.from_pretrained(model).eval(), range(3), texts)
    rank = np.array(ranks(similarity, own))
    assert {scored.metric: scored.value for scored in (found, *found.others)} == {
        f"recall@{k}": pytest.approx((rank < k).mean()) for k in (5, 8, 100)
    }
    assert (rank >= 5).any()
