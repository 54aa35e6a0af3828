"""Only regular files are opened, and never more of them is read than fits."""

import os
import socket

import pytest

from flexmerge_cli.errors import DataError, SourceError
from flexmerge_cli.regular_file import check_kind, open_file, read_file

from .program import flexmerge


def test_a_fifo_a_device_a_socket_and_a_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name, kind in (("pipe", "a FIFO"), ("/dev/zero", "a device"), ("socket", "a socket")):
            with pytest.raises(DataError, match=f"is {kind}, not a file"):
                open_file(tmp_path / name)
            with pytest.raises(DataError, match=f"is {kind}, not a file"):
                check_kind(tmp_path / name)
    with pytest.raises(DataError, match="is a folder, not a file"):
        open_file(tmp_path)
    check_kind(tmp_path)


def test_a_missing_file_is_a_missing_source(tmp_path):
    with pytest.raises(SourceError):
        open_file(tmp_path / "none")


@pytest.mark.parametrize("size", [0, 1, 9, 10])
def test_a_file_of_at_most_the_limit_is_read_whole(size, tmp_path):
    (tmp_path / "x").write_bytes(bytes(size))
    assert read_file(tmp_path / "x", 10, "a plan") == bytes(size)


def test_a_larger_file_is_refused_with_both_sizes(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"1,099,511,627,776 bytes, and a plan has at most 10$"):
        read_file(tmp_path / "x", 10, "a plan")


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "pipe.bin", "model/model.safetensors", "model/config.json"])
def test_no_command_waits_for_what_is_no_file(name, tmp_path):
    """It may be given as a source, a plan, a recipe, a spec, or lie within a checkpoint."""
    (tmp_path / "model").mkdir()
    if not name.startswith("/"):
        os.mkfifo(tmp_path / name)
    path = tmp_path / name.partition("/config.json")[0].partition("/model.s")[0]
    for command in (
        ("inspect", path),
        ("plan", "--base", path, "--task", f"a={path}", "-o", tmp_path / "p.json"),
        ("plan", path, "-o", tmp_path / "p.json"),
        ("merge", path, "--method", "average", "-o", tmp_path / "b"),
        ("eval", path, "--spec", path),
    ):
        result = flexmerge(*command)
        assert result.code in (2, 3, 4), result.err
        assert "bug in flexmerge" not in result.err and "Traceback" not in result.err
    assert not (tmp_path / "b").exists()


def test_forcing_a_bundle_over_a_folder_whose_manifest_is_a_fifo_ends(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    result = flexmerge("inspect", tmp_path)
    assert result.code in (3, 4), result.err
