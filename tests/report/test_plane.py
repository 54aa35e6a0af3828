"""The grid of `curve --plane`, of scores that cannot all be normalised."""

import pytest

from flexmerge_cli.report.plane import plane_section, show_plane


@pytest.mark.parametrize(("values", "best"), [((None, None), None), ((None, -0.5), "a = 1, b = 0")])
def test_a_point_without_a_part_of_the_fine_tuned_score_is_not_the_best(values, best, capsys):
    scores = [{"normalised": value} for value in values]
    points = [
        {"a": a, "b": 0.0, "tasks": {"x": score, "y": score}, "mean": score} for a, score in zip((0.0, 1.0), scores)
    ]
    value = {"plane": {"tasks": ["x", "y"], "places": [0.0, 1.0], "points": points}}
    show_plane(value)
    shown = capsys.readouterr().out
    assert "–" in shown and ("the best of these points" in shown) == (best is not None)
    assert best is None or best in shown
    assert "The plane of two tasks" in plane_section(value)
