"""Bundles in object stores: in memory and, where moto and s3fs are installed, on an S3 server of this machine."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch

from flexmerge_cli import merge, merge_sizes, open_bundle, push
from flexmerge_cli.bundle import store as stores
from flexmerge_cli.bundle import store_parts
from flexmerge_cli.bundle.publish import partial_folder
from flexmerge_cli.cli.storing import AtStore
from flexmerge_cli.engine.journal import Journal
from flexmerge_cli.errors import UsageError
from flexmerge_cli.request.part import parse_part

from ..program import fails, flexmerge, succeeds, tree
from .test_resume import counted

MANIFEST = "manifest.json"


@pytest.fixture(params=["memory", "s3"])
def address(request, monkeypatch, tmp_path):
    """An address of an empty store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "memory":
        yield "memory://packed/bundle"
        fsspec.filesystem("memory").rm("/", recursive=True)
        return
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fsspec.filesystem("s3").makedirs("packed", exist_ok=True)  # servers of one process share their buckets
    yield f"s3://packed/{tmp_path.name}"
    server.stop()


@pytest.fixture(scope="module")
def made(plan, tmp_path_factory):
    """Two bundles of one family, whose weight files have the same names and sizes."""
    folder = tmp_path_factory.mktemp("made")
    for name, method in (("a", "average"), ("b", "task_arithmetic:scale=0.5")):
        succeeds("merge", plan, "--method", method, "--size", "2x", "-o", folder / name)
    return folder


def objects(address):
    files, root = fsspec.core.url_to_fs(address)
    files.invalidate_cache()
    return {name.strip("/").removeprefix(f"{root.strip('/')}/"): files.cat_file(name) for name in files.find(root)}


def own(folder):
    """The files of a bundle without its links."""
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    return {name: data for name, data in tree(folder).items() if name in {*files, MANIFEST, "README.md"}}


class Broken(Exception):
    pass


def breaks_after(monkeypatch, count):
    """Make every further upload fail, as a kill would end it."""
    kept, sent = stores.Store.put, []

    def put(store, file, name):
        if len(sent) == count:
            raise Broken("the connection is gone")
        kept(store, file, name)
        sent.append(name)

    monkeypatch.setattr(stores.Store, "put", put)
    return sent


def test_a_bundle_in_a_store_is_read_like_one_on_this_disk(made, address, tmp_path):
    dry = succeeds("push", made / "a", address, "--dry-run", "--json").json["repositories"][address]
    assert objects(address) == {}
    succeeds("push", made / "a", address)
    assert objects(address) == own(made / "a")
    assert dry["bytes"] == sum(len(data) for data in own(made / "a").values())
    assert push(made / "a", address)["repositories"][address] == {"changed": [], "removed": [], "bytes": 0}
    there, here = open_bundle(address), open_bundle(made / "a")
    for task in here.tasks:
        views = there.view(task), here.view(task)
        assert all(torch.equal(views[0][name], views[1][name]) for name in views[1])
    shown = [succeeds("inspect", source, "--json").json["tasks"] for source in (address, made / "a")]
    assert shown[0] == shown[1]
    succeeds("inspect", address, "--verify")
    for source, name in ((address, "there"), (made / "a", "here")):
        succeeds("export", source, "--task", here.tasks[0], "-o", tmp_path / name)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


@pytest.mark.parametrize("kind", ["link", "symlink"])
def test_one_kind_of_links_is_enough_for_a_bundle_at_an_address(kind, plan, address, monkeypatch, tmp_path):
    def refused(*_arguments, **_options):
        raise OSError(errno.EPERM, "there are no such links")

    succeeds("merge", plan, "-o", tmp_path / "copies")
    succeeds("push", tmp_path / "copies", address)
    monkeypatch.setattr(os, kind, refused)
    succeeds("inspect", address, "--verify")
    succeeds("export", address, "--task", "task0", "-o", tmp_path / "out")


def test_a_push_that_breaks_off_publishes_nothing_and_the_next_one_goes_on(made, address, monkeypatch):
    with monkeypatch.context() as broken:
        first = breaks_after(broken, 2)
        fails(4, "push", made / "a", address, says="nothing was published")
    assert len(first) == 2 and MANIFEST not in objects(address)
    fails(4, "export", address, "--task", "task0", "-o", "nowhere", says="no bundle")
    with monkeypatch.context() as counted:
        rest = breaks_after(counted, 1000)
        succeeds("push", made / "a", address)
    assert {*first, *rest} == own(made / "a").keys() and not set(first) & set(rest) and rest[-1] == MANIFEST
    assert objects(address) == own(made / "a")


@pytest.mark.parametrize("breaks", ["nothing else", "the first", "the second", "both"])
def test_objects_of_another_bundle_are_never_taken_for_ours(breaks, made, address, monkeypatch):
    """Their names and sizes are the same."""
    with monkeypatch.context() as broken:
        breaks_after(broken, {"nothing else": 0, "the second": 1000}.get(breaks, 2))
        flexmerge("push", made / "a", address)
    if breaks in ("the second", "both"):
        with monkeypatch.context() as broken:
            breaks_after(broken, 1)
            fails(4, "push", made / "b", address)
        assert MANIFEST not in objects(address)
    succeeds("push", made / "b", address)
    assert objects(address) == own(made / "b")


def test_a_push_that_breaks_off_while_it_removes_the_old_bundle_leaves_none_of_its_files(
    plan, made, address, monkeypatch, tmp_path
):
    """Files that the new bundle does not have stayed there for ever, and nobody's manifest named them."""
    succeeds("merge", plan, "-o", tmp_path / "copies")
    succeeds("push", tmp_path / "copies", address)
    files, root = fsspec.core.url_to_fs(address)
    remove, removed = files.rm_file, []

    def rm_file(path):
        if removed:
            raise Broken("the connection is gone")
        removed.append(path)
        remove(path)

    with monkeypatch.context() as broken:
        broken.setattr(files, "rm_file", rm_file)
        fails(4, "push", made / "a", address, says="nothing was published")
    assert removed == [f"{root}/{MANIFEST}"]
    files.pipe_file(f"{root}/README.md", b"mine")
    succeeds("push", made / "a", address)
    assert objects(address) == own(made / "a") | {"README.md": b"mine"}


def test_merge_replaces_a_bundle_only_with_force_whatever_a_broken_push_left_beside_it(plan, made, address):
    succeeds("push", made / "a", address)
    files, root = fsspec.core.url_to_fs(address)
    mark = {"format": stores.FORMAT, "manifest": "0" * 64, "files": [], "ready": False}
    files.pipe_file(f"{root}/{stores.MARK}", json.dumps(mark).encode())
    fails(2, "merge", plan, "-o", address, says="exists")
    succeeds("push", made / "b", address)
    assert objects(address) == own(made / "b")


@pytest.mark.parametrize("files", [5, [5], [["a"]], None])
def test_a_mark_that_is_not_ours_counts_as_none(files, made, address):
    store, root = fsspec.core.url_to_fs(address)
    store.pipe_file(f"{root}/{stores.MARK}", json.dumps({"format": stores.FORMAT, "files": files}).encode())
    fails(2, "push", made / "a", address, says="no bundle")


def test_what_else_is_there_is_refused_or_stays(made, address):
    files, root = fsspec.core.url_to_fs(address)
    files.pipe_file(f"{root}/notes.txt", b"mine")
    fails(2, "push", made / "a", address, says="holds 1 objects and no bundle, such as notes.txt")
    files.rm_file(f"{root}/notes.txt")
    succeeds("push", made / "a", address)
    for name in ("notes.txt", "README.md"):
        files.pipe_file(f"{root}/{name}", b"mine")
    succeeds("push", made / "b", address)
    assert objects(address) == own(made / "b") | {"notes.txt": b"mine", "README.md": b"mine"}


def test_merge_writes_to_an_address_and_goes_on_where_it_was_killed(plan, made, address, monkeypatch, tmp_path):
    command = ("merge", plan, "--method", "average", "--size", "2x", "-o", address)
    succeeds(*command, "--dry-run")
    assert objects(address) == {}
    with monkeypatch.context() as broken:
        first = breaks_after(broken, 2)
        fails(4, *command, says="nothing was published")
    with monkeypatch.context() as counted:
        rest = breaks_after(counted, 1000)
        assert succeeds(*command, "--json").json["bundle"] == address
    assert not set(first) & set(rest) and objects(address) == own(made / "a")
    assert not any((tmp_path / "cache").rglob("*.safetensors"))
    fails(2, *command, says=f"{address} exists")
    succeeds("merge", plan, "--method", "task_arithmetic:scale=0.5", "--size", "2x", "-o", address, "--force")
    assert {**objects(address), MANIFEST: b""} == {**own(made / "b"), MANIFEST: b""}
    fails(2, *command, "--part", "1/2", says=f"{address} exists")


def test_parts_go_to_an_address_and_are_joined_there_whatever_breaks_off(plan, made, address, monkeypatch, tmp_path):
    command = ("merge", plan, "--method", "average", "--size", "2x", "-o", address)
    fails(2, *command, "--join", says=f"{address} holds no parts")
    succeeds(*command, "--part", "1/3")
    with monkeypatch.context() as broken:
        broken.setattr(store_parts, "journal_path", Broken)
        fails(4, *command, "--part", "2/3", says=f"{address} has no part 2/3")
    assert len(objects(address)) == 3
    said = fails(2, *command, "--join", says=(f"{address} lacks --part 2/3, --part 3/3", "run --part 2/3 again")).err
    assert str(tmp_path) not in said
    fails(2, *command, "--dtype", "bf16", "--part", "2/3", says="parts of another merge")
    for part in ("2/3", "3/3"):
        succeeds(*command, "--part", part)
    assert counted(*command, "--part", "1/3", "--json")[1] == 0
    assert not any(name.endswith("manifest.json") for name in objects(address))
    with monkeypatch.context() as broken:
        breaks_after(broken, 2)
        fails(4, *command, "--join", says="nothing was published")
    assert MANIFEST not in objects(address)
    _, read = counted(*command, "--join")
    assert objects(address) == own(made / "a") and read == 0
    assert not any((tmp_path / "cache").rglob("*.safetensors"))


def test_a_part_that_was_cut_off_in_the_store_is_not_joined(plan, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ("merge", plan, "--method", "average", "-o", "memory://packed/cut")
    succeeds(*command, "--part", "1/1")
    files = fsspec.filesystem("memory")
    (data,) = (name for name in files.find("/packed/cut") if name.endswith(".data"))
    whole = files.cat_file(data)
    files.pipe_file(data, whole[:-1])
    fails(5, *command, "--join", says="run the part again")
    files.pipe_file(data, whole[:-1] + b"?")
    fails(
        5,
        *command,
        "--join",
        says=("memory://packed/cut is not what its part wrote", "remove the journals", "--part 1/1"),
    )
    assert not files.exists("/packed/cut/manifest.json")
    files.rm(data.replace(".data", ".journal"))
    succeeds(*command, "--part", "1/1")
    succeeds(*command, "--join")
    assert files.exists("/packed/cut/manifest.json")
    files.rm("/packed", recursive=True)


@pytest.mark.parametrize("more", [("--part", "1/1"), ("--join",)])
def test_what_a_killed_run_of_another_merge_left_is_no_obstacle(more, plan, made, monkeypatch, tmp_path):
    """The command was refused for good, with the advice to remove a folder at the address, where there was none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = "memory://packed/again"
    command = ("merge", plan, "--method", "average", "--size", "2x", "-o", address)
    is_joined = more == ("--join",)
    if is_joined:
        succeeds(*command, "--part", "1/1")
    made_in = AtStore.of(address, force=False, offline=False, part=None if is_joined else parse_part("1/1"))
    left = partial_folder(made_in.folder)
    left.mkdir(parents=True)
    with Journal(left, "another merge", parse_part("2/2")):
        pass
    succeeds(*command, *more)
    assert (objects(address) == own(made / "a")) is is_joined
    fsspec.filesystem("memory").rm("/packed", recursive=True)


def test_a_join_needs_no_gpu_and_names_the_disk_that_is_full(plan, made, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ("merge", plan, "--method", "average", "--size", "2x", "-o", "memory://packed/joined")
    fails(2, *command, "--join", "--device", "cuda", says="holds no parts")
    succeeds(*command, "--part", "1/1")
    write, place = os.pwrite, tmp_path / "cache/flexmerge/uploads"

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for broken in ({"disk_usage": lambda _path: SimpleNamespace(free=10)}, {"pwrite": full}):
        with monkeypatch.context() as patched:
            for name, function in broken.items():
                patched.setattr(getattr(store_parts, "shutil" if name == "disk_usage" else "os"), name, function)
            fails(1, *command, "--join", says=f"no space at {place}")
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[: len(data) // 2 + 1], offset))
    succeeds(*command, "--join")
    assert objects("memory://packed/joined") == own(made / "a")
    fsspec.filesystem("memory").rm("/packed", recursive=True)


def test_errors_of_a_bundle_at_an_address_name_the_address(made):
    """They named the folder to which its files were fetched."""
    files = fsspec.filesystem("memory")
    succeeds("push", made / "a", "memory://packed/named")
    (name,) = [name for name in files.find("/packed/named") if name.endswith(".safetensors")][:1]
    files.pipe_file(name, files.cat_file(name)[:-1] + b"?")
    said = fails(5, "export", "memory://packed/named", "--all", "-o", made / "never").err
    error = said[said.index("error: ") :]
    assert f"memory://packed/named/weights/{name.rpartition('/')[2]}" in error and "flexmerge-" not in error
    said = fails(4, "export", "memory://packed/named", "--task", "none", "-o", made / "never").err
    assert "in memory://packed/named" in said
    files.rm("/packed", recursive=True)


def test_a_push_that_cannot_remove_its_mark_says_that_it_is_published(made, monkeypatch):
    files = type(fsspec.filesystem("memory"))
    with monkeypatch.context() as broken:
        broken.setattr(files, "rm_file", lambda *_: (_ for _ in ()).throw(Broken("no permission to delete")))
        said = fails(4, "push", made / "a", "memory://packed/marked", says=".flexmerge-push.json was not removed").err
    assert "is published" in said and "nothing was published" not in said
    succeeds("inspect", "memory://packed/marked")
    succeeds("push", made / "a", "memory://packed/marked")
    assert ".flexmerge-push.json" not in objects("memory://packed/marked")
    files().rm("/packed", recursive=True)


@pytest.mark.parametrize(("target", "more", "says"), [
    ("https://127.0.0.1/x", (), "a web server is not written to"),
    ("memory://x", ("--private",), "for repositories of the Hub"),
    ("nosuch://x", (), "not a source that flexmerge supports"),
    ("file:///nosuch", (), "is a folder on this disk"),
])  # fmt: skip
def test_addresses_that_cannot_be_written(target, more, says, made):
    fails(2, "push", made / "a", target, *more, says=says)


def test_what_writes_to_this_disk_takes_no_address_for_a_folder(plan, made, monkeypatch, tmp_path):
    """`update` made a folder called `s3:`, and merge wrote to the Hub as to an object store, a commit for each file."""
    monkeypatch.chdir(tmp_path)
    for command in (
        ("update", made / "a", "--plan", plan, "-o", "s3://b/x"),
        ("export", made / "a", "--all", "-o", "s3://b/x"),
        ("plan", plan, "--linkage", "average", "-o", "s3://b/plan.json"),
    ):
        fails(2, *command, says="s3:/b/")
    fails(2, "merge", plan, "-o", "hf://org/name", "--dry-run", says="flexmerge push FOLDER hf://org/name")
    with pytest.raises(UsageError, match="is an address"):
        merge(plan, Path("s3://b/x"))
    with pytest.raises(UsageError, match="is an address"):
        merge_sizes(plan, "s3://b/x", method="average", sizes="2x")
    assert list(tmp_path.iterdir()) == []


def test_serve_says_that_it_loads_nothing_from_an_address():
    """It said that --offline, which it does not have, forbade it."""
    fails(2, "serve", "s3://bucket/bundle", says=("serve loads nothing from the network", "copy the bundle"))
