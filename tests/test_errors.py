"""What the machine lacks is told in its own words, whoever's exception says so."""

import errno
import os
import resource
import threading

import numpy as np
import pytest
import torch

from flexmerge_cli.errors import DataError, MachineError, UsageError, machine_failure, show_as


def raised(run):
    with pytest.raises(BaseException) as caught:
        run()
    return caught.value


MOST = 1 << 62


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: bytearray(MOST),
        lambda: np.empty(MOST >> 3),
        lambda: torch.empty(1 << 55),
        lambda: [None] * MOST,
    ],
)
def test_memory_that_python_numpy_and_torch_cannot_have(allocate):
    found = machine_failure(raised(allocate))
    assert isinstance(found, MachineError) and found.exit_code == 1
    assert found.message == "out of memory" and found.hint is not None and "--max-memory" in found.hint


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 40 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_memory_in_the_words_of_other_platforms(error):
    found = machine_failure(error)
    assert found is not None and found.message == "out of memory"


def test_a_thread_that_does_not_start(monkeypatch):
    def no_thread(*_args, **_named):
        raise RuntimeError("can't start new thread")

    name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
    monkeypatch.setattr(threading, name, no_thread)
    found = machine_failure(raised(threading.Thread(target=print).start))
    assert found is not None and "threads" in found.message and found.hint is not None and "--threads 1" in found.hint


def test_a_file_too_many():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        error = raised(lambda: os.open(__file__, os.O_RDONLY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(lowest)
    found = machine_failure(error)
    assert found is not None and "ulimit -n" in str(found.hint)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("a tensor named `out of memory`"),
        OSError(errno.ENOENT, os.strerror(errno.ENOENT), "out of memory"),
        KeyError("x"),
    ],
)
def test_other_errors_are_not_the_machine(error):
    assert machine_failure(error) is None


def test_colours_of_libraries_are_no_part_of_a_message():
    """torch marks words of its messages in bold; a terminal showed the escape sequences as text."""
    error = DataError("weights: \x1b[1mno\x1b[0m such \x1b[38;5;208mkey\x1b[m", hint="\x1b[31mlook\x1b[0m")
    assert (error.message, error.hint, str(error)) == ("weights: no such key", "look", "weights: no such key")
    assert DataError("name \x1b[2J").message == "name \x1b[2J", "what is no colour is made visible where it is shown"


def test_what_the_machine_lacks_is_told_of_its_own_folder():
    """A full disk was said to be at the address of a bundle, which is made in the cache before."""
    show_as("/cache/of-errors", "s3://bucket/b/")
    show_as("/links/of-errors", "/cache/of-errors/coded/a")
    assert UsageError("/links/of-errors/x", hint="/cache/of-errors").message == "s3://bucket/b/coded/a/x"
    found = MachineError("no space at /cache/of-errors", hint="free /cache/of-errors")
    assert (found.message, found.hint) == ("no space at /cache/of-errors", "free /cache/of-errors")
