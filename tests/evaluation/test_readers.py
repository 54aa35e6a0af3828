"""Every format gives the same columns; malformed files are told, and never run."""

import io
import json
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import save_file

from flexmerge_cli.errors import DataError, FlexmergeError, UsageError
from flexmerge_cli.evaluation import readers
from flexmerge_cli.evaluation.data import Column, read_table
from flexmerge_cli.evaluation.readers import guess_format, open_source

from . import tiny

TEXTS, LABELS = ["a, b", "c\nd", 'e "f"', "ü"], [0, 1, 2, 1]


def written(folder, kind):
    path = folder / f"d.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "label": n}) + "\n\n" for t, n in zip(TEXTS, LABELS)))
    elif kind == "json":
        path.write_text(json.dumps([{"text": t, "label": n} for t, n in zip(TEXTS, LABELS)], indent=1))
    elif kind in ("csv", "tsv"):
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter="," if kind == "csv" else "\t").writerows(
                [("text", "label"), *zip(TEXTS, LABELS)]
            )
    elif kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(arrow.table({"text": TEXTS, "label": LABELS}), path)
    elif kind == "npz":
        np.savez(path, text=np.array(TEXTS), label=np.array(LABELS))
    else:
        datasets = pytest.importorskip("datasets")
        path = folder / "saved"
        datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS}).save_to_disk(path)
    return path


def table(folder, data, **task):
    spec = tiny.spec_of(folder, {"kind": "regression", "data": data, **task})
    columns = {"text": Column(name="text"), "label": Column(name="label")}
    place = spec.place("it", folder)
    return read_table(spec.settled("it"), place, columns), place


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "npz", "datasets"])
def test_every_format_gives_the_same_columns(tmp_path, kind):
    path = written(tmp_path, kind)
    found, place = table(tmp_path, path.name)
    assert found.texts("text", place) == TEXTS
    assert found.numbers("label", place).tolist() == LABELS
    assert len(found) == 4 and len(found.digest) == 32
    assert found.digest == table(tmp_path, path.name)[0].digest


def test_arrays_of_safetensors_are_columns_bfloat16_too(tmp_path):
    import torch
    from safetensors.torch import save_file as save_torch

    save_file({"x": np.arange(6.0).reshape(3, 2), "y": np.arange(3)}, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors", "safetensors", None)
    assert source.get("x").tolist() == [[0, 1], [2, 3], [4, 5]] and source.get("y").tolist() == [0, 1, 2]
    save_torch({"x": torch.tensor([1.5, 2.5]).bfloat16()}, tmp_path / "b.safetensors")
    assert open_source(tmp_path / "b.safetensors", "safetensors", None).get("x").tolist() == [1.5, 2.5]


def test_a_split_of_several_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS})
    datasets.DatasetDict({"train": one, "test": one.select([2, 3])}).save_to_disk(tmp_path / "saved")
    found, place = table(tmp_path, {"path": "saved", "split": "test"})
    assert found.texts("text", place) == TEXTS[2:] and found.split == "test"
    for data in ("saved", {"path": "saved", "split": "dev"}):
        with pytest.raises(UsageError, match=r"tasks\.it\.data") as raised:
            table(tmp_path, data)
        assert "train, test" in str(raised.value.hint)


def test_limit_takes_the_first_and_with_a_seed_draws(tmp_path):
    path = written(tmp_path, "jsonl")
    whole, place = table(tmp_path, path.name)
    first, _ = table(tmp_path, path.name, limit=2)
    assert first.texts("text", place) == TEXTS[:2] and first.digest != whole.digest
    drawn = {tuple(table(tmp_path, path.name, limit=2, seed=seed)[0].numbers("label", place)) for seed in range(9)}
    assert len(drawn) > 1
    assert table(tmp_path, path.name, limit=9)[0].digest == whole.digest
    seeded = [table(tmp_path, path.name, limit=3, seed=1)[0] for _ in range(2)]
    assert seeded[0].digest == seeded[1].digest and np.array_equal(seeded[0].rows, seeded[1].rows)


def test_errors_name_the_row_of_the_file_also_of_drawn_examples(tmp_path):
    tiny.rows(tmp_path / "d.jsonl", text=["red"] * 9, label=[0] * 8 + ["x"])
    found, place = table(tmp_path, "d.jsonl", limit=8, seed=2)
    if 8 not in found.rows:
        pytest.skip("not drawn")
    with pytest.raises(UsageError, match="row 9 of"):
        found.numbers("label", place)


def bytes_of(save: Callable[..., None], *arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    save(file, *arrays)
    return file.getvalue()


NPY = bytes_of(np.save, np.arange(3))
NPZ = bytes_of(lambda file, text: np.savez_compressed(file, text=text, label=text), np.arange(1000))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("d.jsonl", b'{"text": "a", "label": 1}\n{"text": ', "line 2"),
        ("d.jsonl", b'{"text": "a", "label": 1}\n[1]\n', "row 2"),
        ("d.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', "row 2 has no `label`"),
        ("d.jsonl", b'{"text": "\xff", "label": 1}\n', "UTF-8"),
        ("d.jsonl", b"[" * 100000, "line 1"),
        ("d.json", b'[{"text": "a"', "line 1"),
        ("d.csv", b"text,label\na\n", "row 1 has 1 values"),
        ("d.csv", b'text,label\n"a,1\n', "CSV"),
        ("d.csv", b"text,label\n\xff,1\n", "UTF-8"),
        ("d.npz", b"PK\x03\x04nonsense", "npz"),
        ("d.npz", b"", "npz"),
        ("d.npz", NPY, "npz"),
        ("d.npz", bytes([byte ^ (60 <= place < 200) for place, byte in enumerate(NPZ)]), "`text` cannot be read"),
        ("d.parquet", b"PAR1 nonsense", "parquet"),
        ("d.safetensors", b"\xff" * 20, "d.safetensors"),
    ],
)
def test_a_malformed_file_is_told(tmp_path, name, data, said):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as raised:
        table(tmp_path, name)
    assert said in raised.value.message and name in raised.value.message


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.json"])
def test_a_table_in_text_that_is_too_large_is_not_read(tmp_path, name, monkeypatch):
    monkeypatch.setattr(readers, "MAX_TEXT_BYTES", 10)
    (tmp_path / name).write_text("[" + " " * 10)
    with pytest.raises(DataError, match="11 bytes"):
        open_source(tmp_path / name, guess_format(tmp_path / name), None)


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("run",))

    np.savez(tmp_path / "d.npz", text=np.array([Bomb()], dtype=object), label=np.zeros(1))
    with pytest.raises(DataError, match="`text` cannot be read"):
        table(tmp_path, "d.npz")


def test_one_number_is_no_column(tmp_path):
    np.savez(tmp_path / "d.npz", text=np.float32(3), label=np.zeros(1))
    with pytest.raises(FlexmergeError, match="not a column"):
        table(tmp_path, "d.npz")


@pytest.mark.parametrize("kind", ["jsonl", "npz", "csv", "parquet", "safetensors", "datasets", "imagefolder"])
def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path, kind):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    name = "file" if kind in ("datasets", "imagefolder") else "folder"
    with pytest.raises(UsageError, match=r"tasks\.it\.data"):
        table(tmp_path, {"path": name, "format": kind})


def test_formats_are_guessed_by_suffix_and_by_what_a_folder_holds(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    names = ["a.JSONL", "a.csv", "a.npz", "a.txt", "saved", "."]
    wanted = ["jsonl", "csv", "npz", None, "datasets", "imagefolder"]
    assert [guess_format(tmp_path / name) for name in names] == wanted


def test_a_data_set_of_the_hub_needs_a_split(tmp_path):
    with pytest.raises(UsageError, match="does not name a data set and a split"):
        table(tmp_path, "hf://org/name")


def test_of_classes_only_folders_of_pictures_are_read(tmp_path):
    from PIL import Image

    for name in ("cat", "dog", ".hidden"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "images" / name / "1.png")
    (tmp_path / "images" / "cat" / "notes.txt").write_text("no picture")
    source = open_source(tmp_path / "images", "imagefolder", None)
    assert source.get("label") == ["cat", "dog"]
    before = source.digest
    Image.new("RGB", (2, 2), "red").save(tmp_path / "images" / "dog" / "1.png")
    assert open_source(tmp_path / "images", "imagefolder", None).digest != before
