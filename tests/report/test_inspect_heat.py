import base64
import io

import numpy as np
import pytest

from flexmerge_cli.report.inspect_heat import LEVELS, NOTHING, RAMP, Scale, ink, png


def test_levels_span_the_scale_and_stay_inside() -> None:
    scale = Scale(low=-1.0, high=1.0)
    assert [scale.level(value) for value in (-9, -1, -0.01, 0.0, 1, 9)] == ["▁", "▁", "▄", "▅", "█", "█"]
    assert {scale.level(value) for value in np.linspace(-1, 1, 99)} == set(LEVELS)
    assert scale.level(float("nan")) == " "


def test_a_scale_of_one_value_or_of_none_works() -> None:
    assert Scale.over(np.full(3, 0.5)).level(0.5) == "▁"
    assert Scale.over(np.array([])) == Scale(low=0.0, high=1.0)


def test_digits_tell_values_apart_and_there_is_no_negative_zero() -> None:
    assert Scale(low=0.0, high=1.0).text(0.12345) == "0.12"
    assert Scale(low=-0.002, high=0.0).text(-0.00123) == "-0.0012"
    assert Scale(low=-1.0, high=1.0).text(-0.001) == "0.00"


def test_the_ramp_darkens_all_along() -> None:
    """Its order is legible without hue: in grey, in print, to colour-blind eyes."""
    colours = Scale(low=0.0, high=1.0).colours(np.linspace(0, 1, 64)).astype(float)
    luminance = colours @ (0.299, 0.587, 0.114)
    assert (np.diff(luminance) < 0.01).all() and luminance[0] - luminance[-1] > 150
    assert colours[0].tolist() == RAMP[0].tolist() and colours[-1].tolist() == RAMP[-1].tolist()


def test_ink_contrasts() -> None:
    for red, green, blue in Scale(low=0.0, high=1.0).colours(np.linspace(0, 1, 32)).tolist():
        paper, text = _relative((red, green, blue)), _relative(ink((red, green, blue)))
        assert (max(paper, text) + 0.05) / (min(paper, text) + 0.05) >= 4.5


def test_png_holds_every_pixel() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = Scale(low=0.0, high=5.0).colours(np.array([[0.0, 1.0, 2.0], [3.0, 4.0, float("nan")]]))
    with image.open(io.BytesIO(base64.b64decode(png(pixels).partition(",")[2]))) as found:
        assert np.array_equal(np.asarray(found), pixels)
    assert tuple(pixels[1, 2]) == NOTHING


def _relative(colour: tuple[int, int, int]) -> float:
    """Relative luminance as WCAG has it."""
    linear = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))
