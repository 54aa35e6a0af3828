"""Image classifiers and CLIP: scores equal those of a plain loop with transformers."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.errors import DataError, SourceError
from flexmerge_cli.evaluation.scoring import Scorer

from . import tiny

N = 20


def images(seed: int = 0) -> np.ndarray:
    """Make images of different colours, a little noisy."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.integers(0, 256, (N, 3, 1, 1)) + rng.integers(-9, 9, (N, 3, 8, 8)), 0, 255).astype(np.uint8)


def labels(classes: int = 3) -> np.ndarray:
    return np.random.default_rng(9).integers(0, classes, N)


def pixels(image: np.ndarray) -> torch.Tensor:
    return ((torch.from_numpy(image).float() / 255 - 0.5) / 0.25)[None]


def predicted(model) -> np.ndarray:
    built = transformers.ViTForImageClassification.from_pretrained(model).eval()
    with torch.inference_mode():
        return np.array([built(pixel_values=pixels(image)).logits[0].argmax().item() for image in images()])


def test_image_classification_of_arrays_equals_a_loop(tmp_path):
    model = tiny.vit(tmp_path / "model")
    np.savez(tmp_path / "d.npz", images=images(), labels=labels())
    task = {"kind": "image-classification", "data": "d.npz", "metric": ["accuracy", "recall@2"], "batch_size": 7}
    found = tiny.scored(model, task)
    wanted = predicted(model)
    assert np.array_equal(found.predictions, wanted) and len(set(wanted)) > 1
    assert found.value == (wanted == labels()).mean() <= found.others[0].value < 1


@pytest.mark.parametrize("form", ["imagefolder", "paths", "parquet", "datasets"])
def test_pictures_are_made_into_pixels_by_the_tasks_own_processor(tmp_path, form):
    names = ["bat", "cat", "dog"]
    model = tiny.vit(
        tmp_path / "model", id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)}
    )
    order = []
    for index, (image, label) in enumerate(zip(images(), labels())):
        folder = tmp_path / "pictures" / "test" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{index:02}.png")
        order.append(folder / f"{index:02}.png")
    data: object = {"path": "pictures", "split": "test"}
    if form == "paths":
        data = tiny.rows(
            tmp_path / "d.jsonl", image=[str(p.relative_to(tmp_path)) for p in order], label=labels().tolist()
        )
    elif form == "parquet":
        arrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        table = arrow.table({"image": [p.read_bytes() for p in order], "label": labels().tolist()})
        pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
        data = "d.parquet"
    elif form == "datasets":
        datasets = pytest.importorskip("datasets")
        table = datasets.Dataset.from_dict({"image": [str(p) for p in order], "label": labels().tolist()})
        table = table.cast_column("image", datasets.Image())
        datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "saved")
        data = {"path": "saved", "split": "test"}
    found = tiny.scored(model, {"kind": "image-classification", "data": data})
    assert found.value == (predicted(model) == labels()).mean()


def class_embeddings(base, classes: list[str], templates: list[str]) -> torch.Tensor:
    built = transformers.CLIPModel.from_pretrained(base).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows = []
    with torch.inference_mode():
        for name in classes:
            each = []
            for template in templates:
                ids = tokenizer(template.replace("{}", name), return_tensors="pt")["input_ids"]
                pooled = built.text_model(input_ids=ids).pooler_output
                each.append(built.text_projection(pooled)[0])
            mean = torch.stack([row / row.norm() for row in each]).mean(0)
            rows.append(mean / mean.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("encoder", ["CLIPModel", "CLIPVisionModelWithProjection", "CLIPVisionModel"])
def test_zero_shot_equals_a_loop_with_the_text_tower_of_the_base(tmp_path, encoder):
    base, model = tiny.clip(tmp_path / "base"), tmp_path / "model"
    whole = transformers.CLIPModel.from_pretrained(base).eval()
    with torch.no_grad():
        for parameter in whole.vision_model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    whole.save_pretrained(model)
    if encoder != "CLIPModel":
        getattr(transformers, encoder).from_pretrained(model).save_pretrained(tmp_path / "encoder")
        model = tmp_path / "encoder"
    (model / "preprocessor_config.json").write_text(
        json.dumps({"rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    )
    classes, templates = ["red", "green", "one two"], ["the {}", "{} is a"]
    np.savez(tmp_path / "d.npz", images=images(), labels=labels())
    task = {"kind": "zero-shot-image-classification", "data": "d.npz", "labels": classes, "templates": templates}
    found = tiny.scored(model, task | {"metric": ["recall@2", "accuracy"]}, base="base")
    texts = class_embeddings(base, classes, templates)
    wanted, scale = [], whole.logit_scale.exp()
    with torch.inference_mode():
        for image in images():
            seen = whole.visual_projection(whole.vision_model(pixel_values=pixels(image)).pooler_output)[0]
            wanted.append((scale * texts @ (seen / seen.norm())).numpy())
    assert np.allclose(found.predictions, wanted, atol=1e-5)
    assert found.others[0].value == (np.argmax(wanted, 1) == labels()).mean()


def test_classes_are_embedded_once_and_templates_are_those_of_the_base(tmp_path, monkeypatch):
    from flexmerge_cli.evaluation.kinds import zero_shot
    from flexmerge_cli.evaluation.scoring import Scorer

    model = tiny.clip(tmp_path / "model")
    (model / "templates.json").write_text(json.dumps(["a {} of"]))
    np.savez(tmp_path / "d.npz", images=images(), labels=labels(2))
    task = {"kind": "zero-shot-image-classification", "data": "d.npz", "labels": ["red", "blue"]}
    spec = tiny.spec_of(tmp_path, task, base="model")
    calls, embed = [], zero_shot._embedded
    monkeypatch.setattr(zero_shot, "_embedded", lambda *args: calls.append(1) or embed(*args))
    scorer = Scorer(spec=spec, device="cpu", cache=None)
    values = {scorer.score(tiny.source_model("it", str(model))).value for _ in range(3)}
    assert len(values) == 1 and len(calls) == 1
    assert scorer.examples("it", model).items[2].prompts == [["a red of"], ["a blue of"]]


@pytest.mark.parametrize("text", ["{", "[]", '{"image_mean": [1, 2]}', '{"image_std": "x"}', '{"rescale_factor": "a"}'])
def test_a_preprocessor_that_is_none_is_told_before_a_weight_is_read(tmp_path, text):
    model = tiny.vit(tmp_path / "model")
    (model / "preprocessor_config.json").write_text(text)
    np.savez(tmp_path / "d.npz", images=images(), labels=labels())
    spec = tiny.spec_of(tmp_path, {"kind": "image-classification", "data": "d.npz"})
    with pytest.raises(DataError, match="preprocessor_config"):
        Scorer(spec=spec).examples("it", model)


@pytest.mark.parametrize("there", [False, True])
def test_offline_holds_for_the_text_model_here_and_in_other_processes(tmp_path, monkeypatch, there):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    model = tiny.clip(tmp_path / "model")
    np.savez(tmp_path / "d.npz", images=images(), labels=labels(2))
    task = {"kind": "zero-shot-image-classification", "data": "d.npz", "labels": ["red", "blue"]}
    spec = tiny.spec_of(tmp_path, task | {"text_model": "hf://org/clip"})
    access = Access(offline=True, on_message=print)
    with pytest.raises(SourceError) as caught:
        Scorer(spec=spec, access=access.for_process() if there else access).examples("it", model)
    assert "hf download org/clip" in str(caught.value.hint)
