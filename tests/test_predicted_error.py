"""What `auto` predicts is what storing loses: samples/predicted_error.py on the digits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "samples/predicted_error.py"


@pytest.mark.slow
def test_predicted_errors_are_near_the_true_ones_where_the_centre_is_precise():
    done = subprocess.run([sys.executable, SCRIPT, "--json"], capture_output=True, text=True, check=True)
    found = {(row["centre"], row["residual"]): row for row in json.loads(done.stdout)}
    for centre in ("dense", "8 bits"):
        row = found[centre, "all"]
        assert abs(row["median"] - 1) <= 0.05 and row["low"] >= 0.8 and row["high"] <= 1.35
