"""What docs/promises.md does not promise: limits of digests, maps and --force, shown so that nobody relies on more."""

import faulthandler
import os
import signal

import pytest
from safetensors.torch import load_file

from flexmerge_cli import open_bundle, verify
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.view import View
from flexmerge_cli.errors import FlexmergeError, IntegrityError

from ..families import assert_same_state
from ..program import succeeds
from .bundles import copy, flip, seal_file

ALL = "weights/all.safetensors"


def damage_in_place(path):
    """A flipped bit that leaves inode, size and time as they were."""
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_forgery_that_brings_its_own_digests_is_sound(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    flip(bundle / ALL)
    assert list(verify(bundle).bad) == [ALL]
    seal_file(bundle, ALL)
    assert verify(bundle).bad == {}
    assert open_bundle(bundle).manifest.id != open_bundle(merged).manifest.id


def test_damage_after_a_file_was_digested_is_found_by_who_opens_it_anew(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    opened = Bundle.open(bundle)
    view = View(opened, "task1", copy=True)
    dict(view)
    damage_in_place(bundle / ALL)
    dict(view)
    opened.check_files("task1")
    with pytest.raises(IntegrityError, match="sha256 differs"):
        dict(open_bundle(bundle).view("task1"))


def test_who_reads_the_files_without_flexmerge_compares_nothing(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    flip(bundle / ALL)
    before, after = load_file(merged / ALL), load_file(bundle / ALL)
    with pytest.raises(AssertionError):
        assert_same_state(after, before)


def test_a_tensor_on_the_map_of_a_file_that_is_cut_ends_the_process_and_a_copy_does_not(merged, tmp_path):
    bundle = copy(merged, tmp_path / "b")
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        view = open_bundle(bundle).view("task1")
        tensors = list(view.values())
        for path in (bundle / "weights").iterdir():
            os.truncate(path, 0)
        for tensor in tensors:
            tensor.clone()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS
    bundle = copy(merged, tmp_path / "c")
    view = open_bundle(bundle).view("task1", copy=True)
    name, tensor = next(iter(view.items()))
    expected = tensor.clone()
    for path in (bundle / "weights").iterdir():
        os.truncate(path, 0)
    assert tensor.equal(expected)
    with pytest.raises(FlexmergeError):
        view[name]


def test_force_goes_by_names_and_does_not_compare_bytes(plan, tmp_path):
    succeeds("merge", plan, "-o", tmp_path / "b")
    expected = (tmp_path / "b/tasks/task0/vocab.txt").read_bytes()
    (tmp_path / "b/tasks/task0/vocab.txt").unlink()
    (tmp_path / "b/tasks/task0/vocab.txt").write_text("mine")
    succeeds("merge", plan, "-o", tmp_path / "b", "--force")
    assert (tmp_path / "b/tasks/task0/vocab.txt").read_bytes() == expected
