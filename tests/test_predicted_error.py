"""What `auto` predicts is what storing loses: samples/predicted_error.py on the digits."""

import json

import pytest

from .program import ROOT, run_script


@pytest.mark.slow
def test_predicted_errors_are_near_the_true_ones_where_the_centre_is_precise(monkeypatch):
    printed = run_script(monkeypatch, ROOT / "samples/predicted_error.py", "--json")
    found = {(row["centre"], row["residual"]): row for row in json.loads(printed)}
    for centre in ("dense", "8 bits"):
        row = found[centre, "all"]
        assert abs(row["median"] - 1) <= 0.05 and row["low"] >= 0.8 and row["high"] <= 1.35
