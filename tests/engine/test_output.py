import hashlib
import os
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.allocation.files import weight_files
from flexmerge_cli.allocation.storage import Part
from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.engine.output import Output
from flexmerge_cli.errors import MachineError
from flexmerge_cli.stored.form import Array


def part(name, num_bytes):
    return Part(
        name=name, array=Array(role="dense", dtype="U8", shape=(num_bytes,)), readers=(0,), tensor=name, task=None
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_digests_are_those_of_the_file_whatever_the_order_of_writing(tmp_path_factory, sizes, random):
    """Ranges of all parts in any order: those that come early are read back."""
    folder = tmp_path_factory.mktemp("output")
    parts = [part(f"p{number}", size) for number, size in enumerate(sizes)]
    (file,) = weight_files((0,), parts, ["a"])
    ranges = [(p, start, min(start + 7, p.num_bytes)) for p in parts for start in range(0, p.num_bytes, 7)]
    random.shuffle(ranges)
    with Output(folder, [file], 1000) as output:
        for p, start, stop in ranges:
            data = np.frombuffer(os.urandom(stop - start), np.uint8)
            output.write(p, start, data)
            output.hashed(p, start, data)
        found = output.finish()
    data = (folder / file.path).read_bytes()
    assert len(data) == file.num_bytes
    assert found == {file.path: (hashlib.sha256(data).hexdigest(), digest_bytes(data))}


def test_a_part_that_was_not_written_is_noticed(tmp_path):
    (file,) = weight_files((0,), [part("a", 5), part("b", 5)], ["t"])
    with Output(tmp_path, [file], 10) as output:
        data = np.zeros(5, np.uint8)
        output.write(file.parts[1], 0, data)
        output.hashed(file.parts[1], 0, data)
        with pytest.raises(AssertionError):
            output.finish()


def test_a_file_that_is_there_is_never_written_over(tmp_path):
    (file,) = weight_files((0,), [part("a", 5)], ["t"])
    (tmp_path / "weights").mkdir()
    (tmp_path / file.path).write_bytes(b"mine")
    with pytest.raises(MachineError), Output(tmp_path, [file], 10):
        pass
    assert (tmp_path / file.path).read_bytes() == b"mine"


@pytest.mark.parametrize("may_be_raised", [True, False])
def test_more_files_than_a_process_may_open_at_first(may_be_raised, tmp_path, monkeypatch):
    """Thirty tasks and tensors as blocks make thousands; a shell gives 1,024, and macOS 256."""
    names = ["other", *(f"t{number}" for number in range(600))]
    files = [file for n in range(600) for file in weight_files((n + 1,), [part("a", 5)], names)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    if not may_be_raised:
        monkeypatch.setattr(resource, "getrlimit", lambda _which: (512, 512))
    try:
        if may_be_raised:
            with Output(tmp_path, files, 10):
                pass
        else:
            with pytest.raises(MachineError, match="open file too many") as raised, Output(tmp_path, files, 10):
                pass
            assert "ulimit -n 1600" in raised.value.hint
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
