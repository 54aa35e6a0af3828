"""Where a stranger's manifest says that factors lie: nothing outside the file, and nothing that does not fit."""

from typing import Any

import pytest
from pydantic import ValidationError

from flexmerge_cli.formats.adapter_changes import ChangeRecord

DIGEST = "0" * 32
LEFT = {"offset": 8, "dtype": "F32", "shape": [6, 2]}
RIGHT = {"offset": 56, "dtype": "F32", "shape": [2, 4]}
LOW_RANK = {"digest": DIGEST, "left": LEFT, "right": RIGHT, "scale": 2.0}
SCALED = {"digest": DIGEST, "vector": {"offset": 8, "dtype": "F32", "shape": [1, 4]}, "axis": 1}
WHOLE = {"digest": DIGEST, "value": {"offset": 8, "dtype": "F32", "shape": [6, 4]}}


@pytest.mark.parametrize("record", [LOW_RANK, SCALED, WHOLE, WHOLE | LOW_RANK, WHOLE | SCALED])
def test_a_sound_change_fits_its_file(record: dict[str, Any]) -> None:
    change = ChangeRecord.model_validate(record)
    change.check("F32", (6, 4), 104 if "left" not in record or "value" in record else 88)
    assert ChangeRecord.model_validate(change.dump()) == change
    with pytest.raises(ValueError):
        change.check("F32", (6, 4), 23)


@pytest.mark.parametrize(
    "edit",
    [
        {"left": LEFT | {"offset": 1 << 40}}, {"left": LEFT | {"offset": -1}}, {"left": LEFT | {"dtype": "F99"}},
        {"left": LEFT | {"shape": [6, 3]}}, {"left": LEFT | {"shape": [12]}}, {"right": None}, {"scale": None},
        {"left": LEFT | {"strides": [1 << 40, 1]}}, {"left": LEFT | {"strides": [1]}}, {"axis": 1},
        {"left": LEFT | {"strides": [-2, 1]}}, {"right": RIGHT | {"shape": [2, 5]}}, {"scale": float("nan")},
        {"left": LEFT | {"dtype": "I32"}}, {"vector": SCALED["vector"], "axis": 1}, {"digest": "x"}, {"more": 1},
        {"value": WHOLE["value"] | {"shape": [6, 5]}}, {"left": LEFT | {"shape": [1 << 47, 1 << 47]}},
    ],
)  # fmt: skip
def test_an_unsound_change_is_refused(edit: dict[str, Any]) -> None:
    with pytest.raises((ValueError, ValidationError)):
        ChangeRecord.model_validate(LOW_RANK | edit).check("F32", (6, 4), 104)


@pytest.mark.parametrize("edit", [{"axis": 0}, {"axis": 2}, {"axis": None}, {"vector": None}])
def test_a_vector_is_of_its_axis(edit: dict[str, Any]) -> None:
    with pytest.raises((ValueError, ValidationError)):
        ChangeRecord.model_validate(SCALED | edit).check("F32", (6, 4), 104)
