"""Every damage of a bundle is found, the tasks that it breaks are named, and the others are known to be sound."""

import shutil

import pytest

from flexmerge_cli import open_bundle, verify
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.errors import DataError, FlexmergeError, IntegrityError

from ..program import fails
from .bundles import copy, flip, manifest_of, seal


@pytest.mark.parametrize("kind", ["merged", "masked", "tied", "coded"])
def test_a_sound_bundle_is_sound(kind, request):
    bundle = request.getfixturevalue(kind)
    for decode in (False, True):
        found = verify(bundle, decode=decode)
        assert (found.bad, found.broken_tasks, found.unknown) == ({}, (), ())
        assert found.sound_tasks == open_bundle(bundle, verify=True).tasks
        assert found.num_files == len(manifest_of(bundle)["files"])
    assert found.num_tensors == sum(len(tensor["digests"]) for tensor in manifest_of(bundle)["tensors"])


@pytest.mark.parametrize("kind", ["merged", "masked", "coded"])
def test_a_flipped_bit_of_any_file_is_found_and_breaks_exactly_its_readers(kind, request, tmp_path):
    original = request.getfixturevalue(kind)
    entries = manifest_of(original)["files"]
    for name, entry in entries.items():
        for place in (-1, len((original / name).read_bytes()) // 2, 0):
            bundle = copy(original, tmp_path / "b")
            flip(bundle / name, place)
            found = verify(bundle)
            assert found.bad == {name: "sha256 differs"}
            assert found.broken_tasks == tuple(entry["tasks"])
            assert found.sound_tasks == tuple(t for t in manifest_of(original)["tasks"] if t not in entry["tasks"])
    with pytest.raises(IntegrityError) as raised:
        open_bundle(bundle, verify=True)
    assert raised.value.exit_code == 5
    assert f"{name}: sha256 differs" in raised.value.message
    sound = ", ".join(found.sound_tasks) or "none"
    assert f"broken: {', '.join(entry['tasks'])}; sound: {sound}" in raised.value.message


def test_a_flipped_bit_of_the_manifest_is_found_wherever_it_is(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    data = (bundle / "manifest.json").read_bytes()
    for place in range(0, len(data), 211):
        for bit in (0, 5, 7):
            flip(bundle / "manifest.json", place, bit)
            with pytest.raises(IntegrityError, match=r"manifest\.json was changed"):
                verify(bundle)
            (bundle / "manifest.json").write_bytes(data)


@pytest.mark.parametrize("word", ["id", "format", "flexmerge.bundle/2"])
def test_a_flipped_bit_of_what_a_manifest_is_known_by_is_found(word, merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    place = (bundle / "manifest.json").read_bytes().index(f'"{word}"'.encode()) + 1
    flip(bundle / "manifest.json", place, 0)
    fails(5, "export", bundle, "--all", "-o", tmp_path / "out", says="was changed: its id does not fit its bytes")
    assert not (tmp_path / "out").exists()


def test_every_damage_is_named_at_once(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    names = sorted(manifest_of(bundle)["files"])
    (bundle / names[0]).unlink()
    flip(bundle / names[1])
    with (bundle / names[2]).open("ab") as file:
        file.write(b"x")
    (bundle / "weights/extra.safetensors").write_bytes(b"")
    found = verify(bundle)
    assert set(found.bad) == set(names[:3])
    assert found.bad[names[0]] == "missing" and "bytes" in found.bad[names[2]]
    assert found.unknown == ("weights/extra.safetensors",)


def test_opening_notices_what_is_missing_or_cut_and_names_all(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    names = sorted(manifest_of(bundle)["files"])
    (bundle / names[0]).unlink()
    with (bundle / names[-1]).open("r+b") as file:
        file.truncate(20)
    opened = Bundle.look(bundle)
    with pytest.raises(IntegrityError) as raised:
        opened.check_tasks(opened.tasks)
    assert f"{names[0]} is missing" in raised.value.message and f"{names[-1]} has 20 bytes" in raised.value.message
    fails(5, "export", bundle, "--all", "-o", tmp_path / "out", says=names[0])
    assert not (tmp_path / "out").exists()


def test_a_file_that_became_a_folder_is_missing(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    name = min(manifest_of(bundle)["files"])
    (bundle / name).unlink()
    (bundle / name).mkdir()
    assert verify(bundle).bad == {name: "missing"}


def test_wrong_digests_of_decoded_tensors_are_found(masked, tmp_path):
    """Every file is as the manifest says, and the manifest is sealed: only decoding tells."""
    bundle = copy(masked, tmp_path / "b")
    fields = manifest_of(bundle)
    tensor = next(tensor for tensor in fields["tensors"] if tensor["class"] == "mergeable")
    tensor["digests"]["task2"] = "0" * 32
    seal(bundle, fields)
    assert verify(bundle).bad == {}
    found = verify(bundle, decode=True)
    assert list(found.bad) == [f"{tensor['name']} of task2"]
    assert found.broken_tasks == ("task2",)


def test_verifying_needs_no_torch(masked, tmp_path):
    """A machine that only keeps bundles has none."""
    import subprocess
    import sys

    from ..program import ROOT

    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from flexmerge_cli import verify\n"
        f"found = verify({str(masked)!r}, decode=True)\n"
        "assert not found.bad and found.num_tensors\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_what_is_no_bundle_is_told(tmp_path):
    with pytest.raises(FlexmergeError) as raised:
        verify(tmp_path)
    assert raised.value.exit_code == 4
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(DataError, match="is not a manifest"):
        verify(tmp_path)
    shutil.rmtree(tmp_path)
