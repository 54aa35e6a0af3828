"""Segmentation and depth: metrics against scikit-learn and plain loops, and kinds against the model run by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
import transformers
from PIL import Image

from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.evaluation.intervals import interval, resamples
from flexmerge_cli.evaluation.kinds.dense import depth_errors, pixel_counts
from flexmerge_cli.evaluation.metrics import METRICS
from flexmerge_cli.evaluation.scored import Scored

from . import tiny

N, CLASSES, SIDE = 5, 4, 16
rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(N, 3, SIDE, SIDE)).astype(np.float32)
MASKS = rng.integers(0, CLASSES - 1, (N, 12, 20)).astype(np.int64)
MASKS[:, :2] = 255
DEPTHS = rng.uniform(0.5, 3.0, (N, 12, 20)).astype(np.float32)
DEPTHS[:, :2] = 0.0


def segformer(folder: Path) -> Path:
    sizes = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 1], mlp_ratios=[1, 1], decoder_hidden_size=8, num_labels=CLASSES, image_size=SIDE,
    )  # fmt: skip
    return tiny.saved(folder, transformers.SegformerForSemanticSegmentation(sizes))


def depth_model(folder: Path) -> Path:
    sizes = transformers.GLPNConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 1], mlp_ratios=[1, 1], decoder_hidden_size=8, max_depth=4,
    )  # fmt: skip
    return tiny.saved(folder, transformers.GLPNForDepthEstimation(sizes))


def resized(maps: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.interpolate(maps, (12, 20), mode="bilinear", align_corners=False).detach().numpy()


def test_mean_iou_and_pixel_accuracy_are_scikit_learns_over_all_pixels():
    found = rng.integers(0, CLASSES, MASKS.shape)
    counts = np.stack([pixel_counts(*pair, CLASSES, 255) for pair in zip(found, MASKS)])
    known = MASKS != 255
    nothing = np.zeros(N, int)
    wanted = sklearn.metrics.jaccard_score(MASKS[known], found[known], average="macro")
    assert METRICS["miou"].value(counts, nothing) == pytest.approx(wanted)
    assert METRICS["pixel_accuracy"].value(counts, nothing) == np.mean(MASKS[known] == found[known])
    draws = [
        sklearn.metrics.jaccard_score(MASKS[rows][known[rows]], found[rows][known[rows]], average="macro")
        for rows in resamples(N, 0)
    ]
    scored = Scored(metric="miou", predictions=counts, labels=nothing)
    assert interval(scored) == pytest.approx(np.quantile(draws, [0.025, 0.975]))


def test_a_class_that_occurs_nowhere_does_not_count():
    counts = pixel_counts(np.array([[0, 0]]), np.array([[0, 1]]), 5, 255)[None]
    assert METRICS["miou"].value(counts, np.zeros(1, int)) == pytest.approx((1 / 2 + 0) / 2)
    assert METRICS["miou"].value(np.zeros((1, 3, 3), int), np.zeros(1, int)) == 0.0


def test_depth_errors_are_a_loop_over_the_pixels_with_a_depth():
    found = rng.uniform(0.5, 3.0, DEPTHS.shape)
    for ours, theirs in zip(found, DEPTHS.astype(np.float64)):
        pairs = [(a, b) for a, b in zip(ours.ravel(), theirs.ravel()) if b > 0]
        wanted = (
            np.mean([abs(a - b) / b for a, b in pairs]), np.sqrt(np.mean([(a - b) ** 2 for a, b in pairs])),
            np.mean([max(a / b, b / a) < 1.25 for a, b in pairs]),
        )  # fmt: skip
        assert depth_errors(ours, theirs) == pytest.approx(wanted)


def test_segmentation_resizes_logits_to_the_labels(tmp_path):
    model = segformer(tmp_path / "model")
    np.savez(tmp_path / "data.npz", images=IMAGES, labels=MASKS)
    task = {"kind": "semantic-segmentation", "data": "data.npz", "metric": ["miou", "pixel_accuracy"], "batch_size": 2}
    found = tiny.scored(model, task)
    built = transformers.SegformerForSemanticSegmentation.from_pretrained(model).eval()
    classes = resized(built(pixel_values=torch.from_numpy(IMAGES)).logits).argmax(1)
    known = MASKS != 255
    assert found.value == pytest.approx(sklearn.metrics.jaccard_score(MASKS[known], classes[known], average="macro"))
    assert found.others[0].value == np.mean(classes[known] == MASKS[known])


def test_depth_is_resized_and_labels_have_a_unit(tmp_path):
    model = depth_model(tmp_path / "model")
    np.savez(tmp_path / "data.npz", images=IMAGES, labels=(DEPTHS * 1000).astype(np.uint16))
    task = {"kind": "depth-estimation", "data": "data.npz", "metric": ["abs_rel", "rmse", "delta1"], "unit": 0.001}
    found = tiny.scored(model, task)
    built = transformers.GLPNForDepthEstimation.from_pretrained(model).eval()
    depths = resized(built(pixel_values=torch.from_numpy(IMAGES)).predicted_depth[:, None])[:, 0]
    wanted = np.mean([depth_errors(*pair) for pair in zip(depths, (DEPTHS * 1000).astype(np.uint16) / 1000)], 0)
    assert [one.value for one in (found, *found.others)] == pytest.approx(wanted, rel=1e-4)
    assert not METRICS["rmse"].higher_is_better and METRICS["delta1"].higher_is_better


def test_labels_may_be_pictures_and_count_in_the_digest(tmp_path):
    from flexmerge_cli.evaluation.scoring import Scorer

    model = segformer(tmp_path / "model")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    (model / "preprocessor_config.json").write_text(json.dumps(processor))
    pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    tiny.rows(tmp_path / "data.jsonl", image=["image.png"], label=["mask.png"])
    task, digests = {"kind": "semantic-segmentation", "data": "data.jsonl"}, set()
    for mask in MASKS[:2]:
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "mask.png")
        found = tiny.scored(model, task)
        assert found.predictions[0].sum() == 2 * (mask != 255).sum() - found.predictions[0, :, 0].sum()
        digests.add(Scorer(spec=tiny.spec_of(tmp_path, task), cache=None).examples("it", model).digest)
    assert len(digests) == 2


def test_labels_that_do_not_fit_are_refused(tmp_path):
    model = segformer(tmp_path / "model")
    task = {"kind": "semantic-segmentation", "data": "data.npz"}
    np.savez(tmp_path / "data.npz", images=IMAGES, labels=np.full((N, 4, 4), CLASSES))
    with pytest.raises(DataError, match=f"label {CLASSES}, the model has {CLASSES} classes"):
        tiny.scored(model, task)
    np.savez(tmp_path / "data.npz", images=IMAGES, labels=np.zeros(N, int))
    with pytest.raises(UsageError, match=r"columns\.label"):
        tiny.scored(model, task)
    with pytest.raises(UsageError, match="ForDepthEstimation"):
        tiny.scored(model, {**task, "kind": "depth-estimation"})
