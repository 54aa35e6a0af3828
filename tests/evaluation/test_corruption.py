"""Corrupted images: each corruption against its formula, and what `corrupt` of a spec scores."""

import io
import json

import numpy as np
import pytest
import xxhash
import yaml
from PIL import Image

from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.kinds import corruption
from flexmerge_cli.evaluation.kinds.corruption import NAMES, Corruption, corrupted, parse_corruptions

from ..program import fails, succeeds
from . import tiny
from .curves import DIGITS, SCORED, Digits, write_spec

COLOURS = np.random.default_rng(3).integers(0, 256, (40, 48, 3), np.uint8)
GREY = COLOURS[..., 0]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def drawn(name: str, severity: int) -> np.random.RandomState:
    """The generator of place 7 with seed 5."""
    return np.random.RandomState(xxhash.xxh32_intdigest(f"5 {name}@{severity} 7".encode()))


def gaussian_noise(pixels: np.ndarray, severity: int) -> np.ndarray:
    spread = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    noise = drawn("gaussian_noise", severity).normal(size=pixels.shape, scale=spread)
    return np.clip(pixels / 255 + noise, 0, 1) * 255


def contrast(pixels: np.ndarray, severity: int) -> np.ndarray:
    part, mean = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1], (pixels / 255).mean((0, 1))
    return np.clip((pixels / 255 - mean) * part + mean, 0, 1) * 255


def pixelate(pixels: np.ndarray, severity: int) -> np.ndarray:
    part, (height, width) = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1], pixels.shape[:2]
    small = Image.fromarray(pixels).resize((int(width * part), int(height * part)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST))


def jpeg_compression(pixels: np.ndarray, severity: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    return np.asarray(Image.open(file).convert("L" if pixels.ndim == 2 else "RGB"))


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("formula", [gaussian_noise, contrast, pixelate, jpeg_compression])
def test_corruptions_are_their_formulas(formula, severity):
    for pixels in (COLOURS, GREY):
        found = corrupted(pixels, Corruption(formula.__name__, severity), 5, 7)
        assert np.array_equal(found, formula(pixels, severity).astype(np.uint8))


def test_impulses_are_as_frequent_as_the_severity_says():
    middle = np.full((200, 200), 128, np.uint8)
    for severity, part in enumerate((0.03, 0.06, 0.09, 0.17, 0.27), 1):
        found = corrupted(middle, Corruption("impulse_noise", severity), 0, 0)
        assert abs(np.isin(found, (0, 255)).mean() - part) < 0.02 and set(np.unique(found)) == {0, 128, 255}


def test_a_motion_blur_keeps_what_is_even_and_smooths_what_is_not():
    even = np.full((40, 40, 3), 77, np.uint8)
    assert np.abs(corrupted(even, Corruption("motion_blur", 3), 0, 0).astype(int) - 77).max() <= 1
    spreads = [corrupted(COLOURS, Corruption("motion_blur", level), 0, 0).std() for level in (1, 3, 5)]
    assert COLOURS.std() > spreads[0] > spreads[1] > spreads[2]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_place_and_seed_give_the_same_pixels_and_leave_numpys_generator_alone(name):
    state = np.random.get_state()[1].copy()
    for pixels in (COLOURS, GREY, COLOURS[:8, :8], np.zeros((8, 8), np.uint8)):
        first, again = (corrupted(pixels, Corruption(name, 3), 1, 2) for _ in range(2))
        assert first.shape == pixels.shape and first.dtype == np.uint8 and np.array_equal(first, again)
        if name in ("gaussian_noise", "impulse_noise", "spatter", "motion_blur") and pixels.shape[0] > 8:
            for seed, place in ((1, 3), (2, 2)):
                assert not np.array_equal(first, corrupted(pixels, Corruption(name, 3), seed, place))
    assert np.array_equal(np.random.get_state()[1], state)


def test_words_are_parsed_and_others_refused():
    assert parse_corruptions(["contrast@2", "contrast@2"]) == (Corruption("contrast", 2),)
    assert [one.severity for one in parse_corruptions(["spatter"])] == [1, 2, 3, 4, 5]
    assert [one.name for one in parse_corruptions(["all@4"])] == list(NAMES)
    for word in ("fog@1", "contrast@6", "contrast@", "", "all@0", "Contrast@1"):
        with pytest.raises(UsageError, match="is not a corruption"):
            parse_corruptions([word])


def corrupted_digits(name: str, seed: int) -> dict[str, np.ndarray]:
    """The first 30 images of a task with gaussian_noise@4, as numbers from 0 to 16."""
    with np.load(DIGITS / f"test/{name}.npz") as file:
        images, labels = file["images"][:30], file["labels"][:30]
    levels = np.rint(images[:, 0].astype(np.float32) / 16 * 255).astype(np.uint8)
    worse = [corrupted(one, Corruption("gaussian_noise", 4), seed, place) for place, one in enumerate(levels)]
    return {"images": np.stack(worse)[:, None].astype(np.float32) / 255 * 16, "labels": labels}


@pytest.mark.parametrize("batch_size", [7, 64])
def test_scores_are_those_of_data_that_were_corrupted_before(sample: Digits, tmp_path, batch_size):
    spec = write_spec(tmp_path / "eval.yaml", batch_size=batch_size, seed=11)
    fields = yaml.safe_load(spec.read_text())
    for task in SCORED:
        np.savez(tmp_path / f"{task}.npz", **corrupted_digits(task, 11))
        fields["tasks"][task]["data"] = f"{task}.npz"
        with np.load(DIGITS / f"test/{task}.npz") as file:
            np.savez(tmp_path / f"{task}-clean.npz", images=file["images"][:30], labels=file["labels"][:30])
    (tmp_path / "before.yaml").write_text(json.dumps(fields))
    clean = {**fields, "tasks": {task: {**of, "data": f"{task}-clean.npz"} for task, of in fields["tasks"].items()}}
    (tmp_path / "clean.yaml").write_text(json.dumps({**clean, "corrupt": "gaussian_noise@4"}))
    wanted = succeeds(
        "eval", "--sources", "--plan", sample.plan_path, "--spec", tmp_path / "before.yaml", "--json"
    ).json
    found = succeeds("eval", "--sources", "--plan", sample.plan_path, "--spec", tmp_path / "clean.yaml", "--json").json
    worse = found["corrupted"]["gaussian_noise@4"]
    for task in SCORED:
        for who in ("fine_tuned", "base"):
            assert worse["tasks"][task][who] == wanted["tasks"][task][who]
    assert worse["mean"] == wanted["mean"] != found["mean"]


def test_pictures_are_corrupted_before_the_processor_sees_them(tmp_path):
    model, rng = tiny.vit(tmp_path / "model"), np.random.default_rng(0)
    for folder in ("clean", "worse"):
        (tmp_path / folder / "a").mkdir(parents=True)
    for place in range(5):
        pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"clean/a/{place}.png")
        Image.fromarray(corrupted(pixels, Corruption("spatter", 2), 0, place)).save(tmp_path / f"worse/a/{place}.png")
    kind = {"kind": "image-classification", "labels": ["a", "b", "c"], "metric": "recall@1"}
    clean = tiny.scored(model, {**kind, "data": str(tmp_path / "clean"), "corrupt": "spatter@2"})
    worse = tiny.scored(model, {**kind, "data": str(tmp_path / "worse")})
    assert np.array_equal(clean.predictions, worse.predictions)


def test_the_option_replaces_the_corruptions_of_the_spec_and_all_of_them_are_shown(sample: Digits, tmp_path):
    fields = yaml.safe_load(sample.spec_path.read_text()) | {"corrupt": ["contrast@1"]}
    (tmp_path / "eval.yaml").write_text(json.dumps(fields))
    arguments = ("eval", "--sources", "--plan", sample.plan_path, "--spec", tmp_path / "eval.yaml")
    asked = ("--corrupt", "pixelate@1", "--corrupt", "pixelate@5", "--csv", tmp_path / "scores.csv")
    shown = succeeds(*arguments, *asked, "--html", tmp_path / "page.html").out
    assert "corrupted data" in shown and "pixelate@5" in shown and "contrast@1" not in shown and " none " in shown
    rows = (tmp_path / "scores.csv").read_text()
    assert rows.count("pixelate@1") == rows.count("pixelate@5") == 2 * len(SCORED)
    assert "pixelate@5" in (tmp_path / "page.html").read_text()


def test_what_cannot_be_corrupted_is_refused_by_key(sample: Digits, tmp_path):
    fields = yaml.safe_load(sample.spec_path.read_text())
    place = tmp_path / "eval.yaml"

    def refused(says: tuple[str, ...], **changed: object) -> None:
        place.write_text(json.dumps(fields | changed))
        fails(2, "eval", "--sources", "--plan", sample.plan_path, "--spec", place, says=says)

    refused(("corrupt: `fog@1`", "motion_blur"), corrupt="fog@1")
    tasks = {name: {**task, "corrupt": "contrast"} for name, task in fields["tasks"].items()}
    refused(("digit.corrupt", "several corruptions"), tasks=tasks)
    np.savez(tmp_path / "bright.npz", images=np.full((3, 1, 8, 8), 17.0), labels=np.zeros(3, int))
    tasks = {**fields["tasks"], "digit": {**fields["tasks"]["digit"], "data": "bright.npz"}}
    refused(("digit.corrupt", "1.06"), tasks=tasks, corrupt="contrast@1")


def test_tasks_without_images_cannot_be_corrupted(tmp_path):
    from flexmerge_cli.evaluation.spec import read_spec

    (tmp_path / "eval.yaml").write_text("version: 1\ncorrupt: contrast@1\ntasks: {a: {kind: causal-lm, data: x.jsonl}}")
    with pytest.raises(UsageError, match="is for image classification"):
        read_spec(tmp_path / "eval.yaml", ("a",))


def test_a_missing_library_is_named_with_its_extra(sample: Digits, monkeypatch):
    def missing() -> None:
        corruption.require("no_such_module", extra=corruption.EXTRA)

    monkeypatch.setattr("flexmerge_cli.evaluation.kinds.images.require_library", missing)
    arguments = ("eval", "--sources", "--plan", sample.plan_path, "--spec", sample.spec_path)
    fails(2, *arguments, "--corrupt", "contrast@1", says="pip install 'flexmerge-cli[corrupt]'")
