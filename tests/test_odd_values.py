"""Manifests and plans of strangers, sound by their digest and odd in their values: read, or refused in plain words.

More of it: python -m tests.test_odd_values SEED SECONDS
"""

import shutil
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from flexmerge_cli.errors import FlexmergeError
from flexmerge_cli.formats.plan_file import read_plan
from flexmerge_cli.json_file import parse_json

from .families import plain, write_family
from .hostile import sealed
from .odd_values import odd_files
from .program import flexmerge, succeeds

METHODS = (["low_bit:bits=2"], ["low_rank"], ["emr"], ["average", "--size", "2x"], ["auto", "--size", "0.4x"])
NUM_FILES = 20  # of each of eight
SPLIT = "split: [{match: output.dense, dim: 1, parts: 2}, {match: intermediate.dense, parts: 2}]"


def made(folder: Path) -> list[tuple[Path, str]]:
    """A plan and bundles: file, and the key of its own digest."""
    folders = write_family(folder / "family", plain(num_tasks=3))
    succeeds("plan", *folders.arguments, "-o", folder / "plan.json")
    for number, method in enumerate(METHODS):
        succeeds("merge", folder / "plan.json", "--method", *method, "-o", folder / f"b{number}")
    shutil.copyfile(folder / "plan.json", folder / "sound.json")
    bundles = [(folder / f"b{number}" / "manifest.json", "id") for number in range(len(METHODS))]
    (folder / "rules.yaml").write_text(SPLIT)
    succeeds("plan", *folders.arguments, "--blocks", folder / "rules.yaml", "-o", folder / "parts.json")
    succeeds("merge", folder / "parts.json", "--method", "average", "--size", "2x", "-o", folder / "parts")
    of_parts = [(folder / "parts.json", "sha256"), (folder / "parts" / "manifest.json", "id")]
    return [(folder / "plan.json", "sha256"), *bundles, *of_parts]


def commands(file: Path, number: int) -> list[tuple[object, ...]]:
    """What is done with a file, some of it now and then."""
    away = file.parent.parent / "away" if file.name == "manifest.json" else file.parent / "away"
    if file.suffix == ".json" and file.name != "manifest.json":
        every = [
            ("inspect", file), ("merge", file, "--method", "average", "--size", "2x", "--dry-run", "-o", away),
            ("plan", file, "--blocks", "layer", "--linkage", "average", "-o", away, "--force"),
            ("merge", file, "--method", "auto", "--size", "1x", "--dry-run", "-o", away), ("inspect", file, "--json"),
            ("diff", file, file.parent / "sound.json"), ("plan", file, "--remove", "task0", "-o", away, "--force"),
            ("plan", file, "--add", f"more={file.parent / 'family' / 'tasks' / 'task1'}", "-o", away, "--force"),
        ]  # fmt: skip
    else:
        every = [
            ("inspect", file.parent), ("export", file.parent, "--task", "task1", "-o", away),
            ("inspect", file.parent, "--json"), ("inspect", file.parent, "--verify", "--decode"),
            ("diff", file.parent.parent / "b0", file.parent, "--json"), ("export", file.parent, "--all", "-o", away),
            ("export", file.parent, "--as-lora", "-o", away),
        ]  # fmt: skip
    return [every[0], every[1 + number % (len(every) - 1)]]


def run_all(file: Path, key: str, *, seed: int, count: int | None, seconds: float = 1e9) -> int:
    """How many files were tried; the sound one is put back."""
    sound, end = file.read_bytes(), time.monotonic() + seconds
    number = 0
    try:
        for number, (change, data) in enumerate(islice(odd_files(sound, key, seed=seed), count), 1):
            file.write_bytes(data)
            for command in commands(file, number):
                result = flexmerge(*command)  # which fails of a defect
                assert result.code in (0, 2, 3, 4, 5, 6, 7), (change, command, result)
                assert result.code == 0 or len(result.err) < 30_000, change
                for left in (command[-1], command[-2]):
                    if isinstance(left, Path) and left.name == "away":
                        shutil.rmtree(left, ignore_errors=True)
                        left.unlink(missing_ok=True)
            if time.monotonic() > end:
                break
    finally:
        file.write_bytes(sound)
    return number


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return made(tmp_path_factory.mktemp("odd"))


@pytest.mark.parametrize("place", range(3 + len(METHODS)))
def test_an_odd_value_is_read_or_refused_in_plain_words(place, files):
    assert run_all(*files[place], seed=17 + place, count=NUM_FILES) == NUM_FILES


def test_a_plan_that_does_not_merge_a_block_is_refused(files, tmp_path):
    fields = parse_json(files[0][0].read_bytes())
    fields["order"] = [merge for merge in fields["order"] if merge["block"] != fields["order"][0]["block"]]
    (tmp_path / "plan.json").write_bytes(sealed(fields, "sha256"))
    with pytest.raises(FlexmergeError, match="does not merge all tasks of block"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("field", ["gram", "base_energy"])
def test_measurements_that_no_weights_have_are_refused_or_nothing(field, files, tmp_path):
    """1e308 overflowed in the first sum, which was called a defect or printed numpy's warnings."""
    fields = parse_json(files[0][0].read_bytes())
    for value in (1e101, -1e308, 5e-324):
        for tensor in fields["tensors"]:
            if field == "base_energy" or tensor["gram"] is not None:
                tensor[field] = value if field == "base_energy" else [[value] * 3] * 3
        (tmp_path / "plan.json").write_bytes(sealed(fields, "sha256"))
        if abs(value) > 1:
            with pytest.raises(FlexmergeError, match="a sum over float32 weights cannot be so large"):
                read_plan(tmp_path / "plan.json")
        else:
            assert not any(np.any(getattr(tensor, field)) for tensor in read_plan(tmp_path / "plan.json").tensors)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"[" + b"[]," * 100_000 + b"[]]", b'{"a":' * 50_000, b"\xff", b"[1,", b""]
)
def test_json_that_is_dense_or_deep_is_refused_before_it_takes_memory(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    "text", [b"NaN", b"-Infinity", b"1" + b"0" * 400, b"-9223372036854775809", b"18446744073709551616"]
)
def test_numbers_of_ours_have_64_bits(text):
    with pytest.raises(ValueError):
        parse_json(b'{"a":' + text + b"}", is_ours=True)
    parse_json(b'{"a":' + text + b"}")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        everything = made(Path(folder))
        each = float(sys.argv[2]) / len(everything)
        print(sum(run_all(*file, seed=int(sys.argv[1]), count=None, seconds=each) for file in everything), "files")
