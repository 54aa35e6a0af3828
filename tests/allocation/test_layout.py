"""What a bundle will be, to the byte: against what is written, and what the safetensors package reads."""

import json

import pytest
from safetensors import safe_open

from flexmerge_cli import load_plan
from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.files import MAX_STEM_BYTES, file_stem, safetensors_header, weight_files
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.allocation.manifest_bytes import Measured, fixed
from flexmerge_cli.allocation.options import served_bytes
from flexmerge_cli.allocation.storage import Part
from flexmerge_cli.checkpoint.digest import FileDigests
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.errors import DataError
from flexmerge_cli.methods.use import parse_use
from flexmerge_cli.stored.form import Array

from ..families import ODD
from ..program import stored_sizes, succeeds


def part(name, dtype="F32", shape=(2,)):
    array = Array(role="dense", dtype=dtype, shape=shape)
    return Part(name=name, array=array, readers=(0,), tensor=name, task=None)


@pytest.mark.parametrize("method", [None, "average", "emr"])
@pytest.mark.parametrize("name", ODD)
def test_dry_run_is_right_to_the_byte(name, method, odd_plan, tmp_path):
    options = ["--method", method] if method else []
    said = succeeds("merge", odd_plan(name), *options, "-o", tmp_path / "b", "--dry-run", "--json").json
    assert not (tmp_path / "b").exists() and not said["written"]
    done = succeeds("merge", odd_plan(name), *options, "-o", tmp_path / "b", "--json").json
    files = stored_sizes(tmp_path / "b")
    assert said["files"] == done["files"] == files
    assert said["total_bytes"] == done["total_bytes"] == sum(files.values())
    data = {}
    for path in (tmp_path / "b/weights").iterdir():
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"flexmerge": "bundle", "format": "pt"}
            data |= {(path.name, key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    assert said["tensor_bytes"] == sum(value.numel() * value.element_size() for value in data.values())


def test_a_part_is_in_the_file_of_exactly_its_readers(odd_plan):
    pricer = Pricer(load_plan(odd_plan("heads")))
    made = Cutter(pricer, parse_use("emr"))
    for number in range(0, len(pricer.plan.order) + 1, 5):
        layout = pricer.layout(made.prefix(number))
        seen = {}
        for file in layout.files:
            assert file.parts
            assert all(p.readers == file.readers for p in file.parts)
            seen |= {(p.name, file.readers): p for p in file.parts}
        of_storages = {id(p) for storage in layout.storages.values() for p in storage.parts}
        assert of_storages <= {id(p) for p in seen.values()}
        assert len(seen) == sum(len(file.parts) for file in layout.files)


def test_parts_are_aligned_to_their_items():
    parts = [part(f"p{n}", dtype, (3,)) for n, dtype in enumerate(sorted(ITEM_BYTES))]
    (file,) = weight_files((0,), parts, ["a"])
    assert len(file.header) % 8 == 0
    for found, offset in zip(file.parts, file.offsets()):
        assert offset % ITEM_BYTES[found.array.dtype] == 0
    assert file.num_bytes == len(file.header) + sum(p.num_bytes for p in parts)


def test_two_parts_of_one_name_are_refused():
    for names in (("a", "a"), ("__metadata__",)):
        with pytest.raises(DataError, match="two stored arrays would be called"):
            weight_files((0,), [part(name) for name in names], ["a"])


def test_files_over_the_limit_are_split(monkeypatch):
    monkeypatch.setattr("flexmerge_cli.allocation.files.SHARD_BYTES", 20)
    files = weight_files((0, 1), [part(f"p{n}") for n in range(5)] + [part("q", shape=(9,))], ["a", "b", "c"])
    assert [file.path for file in files] == [f"weights/a+b-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert [[p.name for p in file.parts] for file in files] == [["p0", "p1"], ["p2", "p3"], ["p4"], ["q"]]


def test_long_names_of_readers_are_hashed():
    names = [f"task-{n:02d}" for n in range(30)]
    assert file_stem(tuple(range(30)), names) == "all"
    assert file_stem((0, 3), names) == "task-00+task-03"
    long = file_stem(tuple(range(29)), names)
    assert long.startswith("29-") and len(long) == 3 + 16
    stems = {file_stem(tuple(t for t in range(30) if t != left), names) for left in range(30)}
    assert len(stems) == 30 and all(len(stem) <= MAX_STEM_BYTES for stem in stems)


def test_headers_are_canonical():
    header = safetensors_header({"b": ("F32", (2, 3), 24), "a": ("U8", (), 1)}, {"format": "pt"})
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert json.loads(header[8:]) == {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "a": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]},
    }


@pytest.mark.parametrize(
    "value", [0, 1, 0.1234567, 9.9999999, 1e-99, 1e-120, 1e99, 123456.789, None, float("inf"), float("nan")]
)
def test_measured_numbers_have_one_width(value):
    text = fixed(value).text
    assert len(text) == 12
    found = json.loads(text)
    if value is None or value != value or value == float("inf"):
        assert found is None
    else:
        assert found == pytest.approx(value, rel=1e-6, abs=1e-99)


def test_what_was_measured_does_not_change_the_manifests_length(odd_plan):
    layout = Pricer(load_plan(odd_plan("heads"))).layout(
        Cutter(Pricer(load_plan(odd_plan("heads"))), parse_use("emr")).smallest()
    )
    measured = Measured(
        task_distance={0: 0.123, 1: None, 2: 1e-30},
        group_distance={
            (u.name, g.tasks): dict.fromkeys(g.tasks, 0.5) for u in layout.allocation.units for g in u.groups
        },
        digests={name: dict.fromkeys(range(4), "f" * 32) for name in layout.storages},
        files={file.path: FileDigests("e" * 64, "e" * 32) for file in (*layout.files, *layout.small)},
    )
    assert (
        len(layout.manifest(measured))
        == len(layout.manifest(Measured()))
        == layout.total_bytes - sum(file.num_bytes for file in (*layout.files, *layout.small))
    )


def test_served_bytes_count_what_tasks_share_once(odd_plan, odd_family):
    pricer = Pricer(load_plan(odd_plan("plain")))
    one = sum(4 * value.numel() for value in odd_family("plain").models.base.values())
    made = Cutter(pricer, parse_use("average"))
    assert served_bytes(pricer.layout(made.prefix(0))) == 4 * one
    assert served_bytes(pricer.layout(made.prefix(len(made.order)))) == one
    masked = Cutter(pricer, parse_use("emr"))
    assert served_bytes(pricer.layout(masked.prefix(len(masked.order)))) == 4 * one


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_cast_is_priced_as_what_is_stored(dtype, odd_plan, odd_family, tmp_path):
    result = succeeds("merge", odd_plan("buffers"), "--dtype", dtype, "-o", tmp_path / "b", "--json").json
    models = odd_family("buffers").models
    item = 4 if dtype == "fp32" else 2
    floating = sum(item * v.numel() for s in models.tasks.values() for v in s.values() if v.is_floating_point())
    assert result["tensor_bytes"] == floating + 11 * 8 + 2 * 8 + 4 * 3  # ids once, two counts, four masks
