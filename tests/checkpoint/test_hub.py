"""`hf://`: what is refused before a network is needed, and what the real client fetches from a Hub on this machine."""

import errno
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download, snapshot_download

from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.checkpoint.place import HubPlace, is_remote
from flexmerge_cli.errors import DataError, FlexmergeError, MachineError, SourceError, UsageError

from ..families import LAYOUTS, encoder, write_checkpoint

STATE = encoder()
REPOSITORY = "org/name"
SOURCE = f"hf://{REPOSITORY}"


def publish(hub, folder: Path, state=STATE, name=REPOSITORY, layout="file", **more: bytes) -> str:
    write_checkpoint(folder, state, layout=layout)
    (folder / "config.json").write_text(json.dumps({"model_type": "test"}))
    (folder / "vocab.txt").write_text("the\n" * 50)
    for path, data in more.items():
        (folder / path).write_bytes(data)
    return hub.add(name, folder)


@pytest.mark.parametrize(("source", "has_scheme"), [
    ("hf://org/name", True), ("http://org/name", True), ("s3://x", True), ("org/name", False), ("./hf:/x", False),
    ("/hf://x", False), ("C:/x", False), ("HF://x/y", False),
])  # fmt: skip
def test_only_a_scheme_is_no_path(source, has_scheme):
    assert is_remote(source) == has_scheme


@pytest.mark.parametrize("source", [
    "hf://name", "hf://", "hx://org/name", "hf://org/name:../x", "hf://org/name:a/../../x", "hf://org/name@../../x",
    "hf://../name", "hf://a..b/c", "hf://org/name@", "hf://org/na me", "hf://org/name:a@b",
])  # fmt: skip
def test_what_cannot_be_a_repository_is_refused_without_a_request(source, hub):
    with pytest.raises(UsageError):
        open_checkpoint(source)
    assert hub.requests == []


def test_a_source_is_taken_apart_and_put_together():
    place = HubPlace.of("hf://org/name@refs/pr/3:unet/deep")
    assert (place.repository, place.revision, place.subfolder) == ("org/name", "refs/pr/3", "unet/deep")
    assert place.source == "hf://org/name@refs/pr/3:unet/deep"
    assert HubPlace.of("hf://org/name:x/model.safetensors").file == "model.safetensors"
    assert HubPlace.of("hf://org/name:x/model.safetensors").folder == "x"


# Opening.


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("layout", ["file", "shards"])
def test_opening_reads_headers_and_no_weight(layout, hub, tmp_path):
    commit = publish(hub, tmp_path / "made", layout=layout)
    found = open_checkpoint(SOURCE)
    local = open_checkpoint(str(tmp_path / "made"))
    assert found.source == f"{SOURCE}@{commit}"
    assert [(t.name, t.dtype, t.shape, t.offset) for t in found.tensors.values()] == [
        (t.name, t.dtype, t.shape, t.offset) for t in local.tensors.values()
    ]
    assert found.config == {"model_type": "test"}
    assert list(found.side_files) == list(local.side_files)
    assert all(path.is_file() for path in found.side_files.values())
    assert found.ignored == local.ignored
    assert hub.weights_sent() == sum(map(header_bytes, (tmp_path / "made").glob("*.safetensors")))
    assert sorted(found.weight_bytes.values()) == sorted(local.weight_bytes.values())
    assert not any(path.exists() for path in found.weight_bytes)


@pytest.mark.parametrize("layout", ["bin", "bin-shards", "pt"])
def test_a_pickle_is_located_by_ranges_and_no_weight_is_read(layout, hub, tmp_path):
    # Weights far larger than an archive's records, so that what is read of them would show.
    state = {f"layer.{number}.weight": torch.randn(300, 300) for number in range(6)}
    publish(hub, tmp_path / "made", state, layout=layout)
    found, local = open_checkpoint(SOURCE), open_checkpoint(str(tmp_path / "made"))
    assert {t.name: (t.offset, t.shape) for t in found.tensors.values()} == {
        t.name: (t.offset, t.shape) for t in local.tensors.values()
    }
    assert hub.weights_sent() < 0.02 * found.num_bytes


def test_inspect_takes_config_and_headers_alone(hub, tmp_path):
    publish(hub, tmp_path / "made")
    open_checkpoint(SOURCE, side_files=False)
    assert set(hub.sent) == {f"{REPOSITORY}/config.json", f"{REPOSITORY}/model.safetensors"}


def test_a_subfolder_and_a_file_in_it(hub, tmp_path):
    write_checkpoint(tmp_path / "made/unet", STATE)
    (tmp_path / "made/unet/config.json").write_text('{"x": 1}')
    (tmp_path / "made/config.json").write_text("{}")
    commit = hub.add(REPOSITORY, tmp_path / "made")
    found = open_checkpoint(f"{SOURCE}:unet")
    assert (found.source, found.config) == (f"{SOURCE}@{commit}:unet", {"x": 1})
    one = open_checkpoint(f"{SOURCE}:unet/model.safetensors")
    assert (list(one.tensors), one.config) == (list(found.tensors), {})
    fetch([*found.remote.values(), *one.remote.values()], Access())
    assert all(path.is_file() for path in found.weight_bytes)
    assert list(open_checkpoint(f"{SOURCE}:unet", access=Access(offline=True)).tensors) == list(found.tensors)


def test_a_branch_and_a_tag_are_pinned_to_what_they_are_now(hub, tmp_path):
    old = publish(hub, tmp_path / "old")
    hub.add(REPOSITORY, {**hub.repositories[REPOSITORY].commits[old], "vocab.txt": b"new"}, branch="refs/pr/1")
    assert open_checkpoint(SOURCE).source.endswith(old)
    assert not open_checkpoint(f"{SOURCE}@refs/pr/1").source.endswith(old)


def test_a_listing_is_read_to_its_end(hub, tmp_path):
    publish(hub, tmp_path / "made", **{f"note{number}.txt": b"x" for number in range(20)})
    assert len(open_checkpoint(SOURCE).side_files) == 22


# Fetching.


def test_fetched_files_are_in_the_normal_cache_and_said_beforehand(hub, tmp_path):
    commit = publish(hub, tmp_path / "made", layout="shards")
    found, said, steps = open_checkpoint(SOURCE), [], []
    hub.forget()
    fetch(found.remote.values(), Access(on_message=said.append), lambda _what, done, total: steps.append((done, total)))
    total = sum(found.weight_bytes.values())
    assert hub.weights_sent() == total == steps[-1][0] == steps[-1][1]
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert said == [f"fetching {total:,} bytes in 3 files from the Hub into {tmp_path / 'hub-cache'}"]
    hub.forget()
    for path in found.weight_bytes:
        assert path.read_bytes() == (tmp_path / "made" / path.name).read_bytes()
        assert hf_hub_download(REPOSITORY, path.name, revision=commit, local_files_only=True) == str(path)
    assert hub.leaked == []


def test_what_another_tool_has_fetched_is_used(hub, tmp_path):
    commit = publish(hub, tmp_path / "made", layout="shards")
    snapshot_download(REPOSITORY)
    hub.forget()
    found = open_checkpoint(SOURCE)
    assert (found.remote, hub.weights_sent(), sum(hub.sent.values())) == ({}, 0, 0)
    assert found.path == tmp_path / "hub-cache/models--org--name/snapshots" / commit


def test_a_pinned_snapshot_that_is_whole_needs_no_request(hub, tmp_path):
    commit = publish(hub, tmp_path / "made", layout="shards")
    fetch(open_checkpoint(SOURCE).remote.values(), Access())
    hub.forget()
    found = open_checkpoint(f"{SOURCE}@{commit}", needs=["config.json", "vocab.txt"])
    assert (hub.requests, set(found.tensors)) == ([], set(STATE))
    open_checkpoint(f"{SOURCE}@{commit}", needs=["config.json", "another.txt"])
    assert hub.requests != []


def test_the_same_bytes_of_another_commit_are_not_fetched_again(hub, tmp_path):
    commit = publish(hub, tmp_path / "made")
    fetch(open_checkpoint(SOURCE).remote.values(), Access())
    hub.add(REPOSITORY, {**hub.repositories[REPOSITORY].commits[commit], "vocab.txt": b"new"})
    found, said = open_checkpoint(SOURCE), []
    hub.forget()
    fetch(found.remote.values(), Access(on_message=said.append))
    assert (hub.weights_sent(), said) == (0, [])
    assert all(path.is_file() for path in found.weight_bytes)


BIG = {"a.weight": torch.randn(200, 500), "b.weight": torch.randn(100, 300)}
KEY = f"{REPOSITORY}/model.safetensors"


@pytest.fixture
def quick(monkeypatch):
    """No waiting between tries: where the client sleeps, it has nothing to wait for here."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)


def test_a_cut_download_resumes_and_is_not_fetched_twice(hub, tmp_path, quick):
    publish(hub, tmp_path / "made", BIG)
    found = open_checkpoint(SOURCE)
    hub.forget()
    hub.cuts[KEY] = [100_000, 1, 0, 50_000]
    fetch(found.remote.values(), Access())
    (path,) = found.weight_bytes
    assert path.read_bytes() == (tmp_path / "made/model.safetensors").read_bytes()
    assert hub.sent[KEY] == path.stat().st_size
    starts = [int(asked.split("=")[1].split("-")[0]) for _, path, asked in hub.requests if path.startswith("/cdn")]
    assert starts == [0, 100_000, 100_001, 100_001, 150_001]


def test_a_run_that_gave_up_is_gone_on_with_by_the_next(hub, tmp_path, quick):
    publish(hub, tmp_path / "made", BIG)
    found, said = open_checkpoint(SOURCE), []
    hub.forget()
    hub.cuts[KEY] = [100_000] + [0] * 100
    with pytest.raises(SourceError, match="cannot be fetched") as raised:
        fetch(found.remote.values(), Access())
    assert "run the command again" in raised.value.hint
    hub.cuts.clear()
    fetch(open_checkpoint(SOURCE).remote.values(), Access(on_message=said.append))
    (path,) = found.weight_bytes
    assert path.read_bytes() == (tmp_path / "made/model.safetensors").read_bytes()
    assert hub.sent[KEY] == path.stat().st_size + header_bytes(path)
    assert "(100,000 bytes of them are there already)" in said[0]


def test_a_stalled_connection_is_left_and_the_rest_fetched(hub, tmp_path, quick, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    publish(hub, tmp_path / "made", BIG)
    found = open_checkpoint(SOURCE)
    hub.pauses[KEY] = [3.0]
    fetch(found.remote.values(), Access())
    (path,) = found.weight_bytes
    assert path.read_bytes() == (tmp_path / "made/model.safetensors").read_bytes()


def test_an_address_that_expires_while_a_file_is_fetched_is_asked_for_anew(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path / "made", BIG)
    found = open_checkpoint(SOURCE)
    hub.cuts[KEY] = [100_000]

    def expire(_seconds):
        hub.signature = 1

    monkeypatch.setattr("time.sleep", expire)
    fetch(found.remote.values(), Access())
    (path,) = found.weight_bytes
    assert path.read_bytes() == (tmp_path / "made/model.safetensors").read_bytes()


def test_a_server_without_ranges_serves_whole_files_and_headers(hub, tmp_path, quick):
    hub.ranges = False
    publish(hub, tmp_path / "made", BIG)
    found = open_checkpoint(SOURCE)
    assert set(found.tensors) == set(BIG)
    hub.cuts[KEY] = [100_000]
    fetch(found.remote.values(), Access())
    (path,) = found.weight_bytes
    assert path.read_bytes() == (tmp_path / "made/model.safetensors").read_bytes()


def test_a_server_without_ranges_is_not_read_to_its_end_for_the_directory_of_an_archive(hub, tmp_path):
    hub.ranges = False
    publish(hub, tmp_path / "made", {"a.weight": torch.randn(700, 700)}, layout="bin")
    with pytest.raises(SourceError, match="requests for a range"):
        open_checkpoint(SOURCE)


def test_a_header_whose_connection_breaks_is_read_to_its_end(hub, tmp_path, quick):
    publish(hub, tmp_path / "made")
    hub.cuts[KEY] = [3, 0, 5, 100]
    assert set(open_checkpoint(SOURCE).tensors) == set(STATE)
    assert hub.sent[KEY] == header_bytes(tmp_path / "made/model.safetensors")


def test_answers_that_end_too_early_are_told_and_not_asked_for_without_end(hub, tmp_path, quick):
    """A proxy's page of status 200 is one: it has its own length, and no connection breaks."""
    hub.ranges = False
    publish(hub, tmp_path / "made")
    (file,) = open_checkpoint(SOURCE).remote.values()
    hub.forget()
    with pytest.raises(SourceError, match="a response ended at byte"):
        file.read_range(0, file.size + 1)
    assert len(hub.requests) < 20


def test_a_cache_without_room_is_told_before_a_byte_is_fetched(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path / "made")
    found = open_checkpoint(SOURCE)
    hub.forget()
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 100})())
    with pytest.raises(MachineError, match="100 bytes free") as raised:
        fetch(found.remote.values(), Access())
    assert "HF_HOME" in raised.value.hint
    assert hub.requests == []


def test_a_disk_that_is_full_meanwhile_is_the_machines_fault(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path / "made")
    found = open_checkpoint(SOURCE)

    def full(*_arguments, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flexmerge_cli.checkpoint.fetch.stream_range", full)
    with pytest.raises(MachineError, match="No space left") as raised:
        fetch(found.remote.values(), Access())
    assert "HF_HOME" in raised.value.hint


def test_what_is_left_of_a_broken_run_is_checked(hub, tmp_path):
    """A machine that lost its power may have kept a file's length and not its bytes."""
    publish(hub, tmp_path / "made", BIG)
    found = open_checkpoint(SOURCE)
    (remote,) = found.remote.values()
    blobs = tmp_path / "hub-cache/models--org--name/blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    (blobs / f"{remote.etag}.incomplete").write_bytes(bytes(1000))
    with pytest.raises(SourceError, match="differs from the digest that the Hub lists"):
        fetch([remote], Access())
    fetch([remote], Access())
    assert remote.path.read_bytes() == (tmp_path / "made/model.safetensors").read_bytes()


# What cannot be had: exit 4, with what to run next.


def test_a_gated_repository_asks_for_access_and_a_token_opens_it(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path / "made")
    hub.repositories[REPOSITORY].gated = True
    with pytest.raises(SourceError, match="is gated") as raised:
        open_checkpoint(SOURCE)
    assert raised.value.hint == f"ask for access at {hub.url}/{REPOSITORY}, then run `hf auth login`"
    hub.tokens = {"hf_stranger": set(), "hf_friend": {REPOSITORY}}
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    with pytest.raises(SourceError, match="the token in use has no access") as raised:
        open_checkpoint(SOURCE)
    assert "hf auth login" in raised.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_friend")
    fetch(open_checkpoint(SOURCE).remote.values(), Access())
    assert hub.leaked == [], "the token went to the second origin"


def test_a_private_repository_is_like_a_missing_one_to_strangers(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path / "made")
    hub.repositories[REPOSITORY].private = True
    for source in (SOURCE, "hf://org/missing", f"{SOURCE}@main"):
        with pytest.raises(SourceError, match="no such repository") as raised:
            open_checkpoint(source)
        assert "hf auth login" in raised.value.hint
    hub.tokens = {"hf_friend": {REPOSITORY}}
    monkeypatch.setenv("HF_TOKEN", "hf_friend")
    assert set(open_checkpoint(SOURCE).tensors) == set(STATE)


def test_a_token_that_is_none_is_told(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path / "made")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SourceError, match="does not accept the token") as raised:
        open_checkpoint(SOURCE)
    assert "hf auth login" in raised.value.hint


@pytest.mark.parametrize("revision", ["nonsense", "0" * 40])
def test_a_wrong_revision_is_told(revision, hub, tmp_path):
    publish(hub, tmp_path / "made")
    with pytest.raises(SourceError, match=f"no revision `{revision}`") as raised:
        open_checkpoint(f"{SOURCE}@{revision}")
    assert raised.value.hint.endswith(f"flexmerge inspect {SOURCE}")


def test_a_missing_folder_and_a_missing_file_are_told(hub, tmp_path):
    publish(hub, tmp_path / "made")
    with pytest.raises(SourceError, match="a file or folder is missing"):
        open_checkpoint(f"{SOURCE}:unet")
    with pytest.raises(SourceError, match=r"no file `other\.safetensors`"):
        open_checkpoint(f"{SOURCE}:other.safetensors")


def test_a_repository_without_weights_is_told(hub):
    hub.add(REPOSITORY, {"README.md": b"#"})
    with pytest.raises(SourceError, match="no checkpoint in"):
        open_checkpoint(SOURCE)


def test_a_shard_that_the_repository_has_not_is_unsound(hub, tmp_path):
    write_checkpoint(tmp_path / "made", STATE, layout="shards")
    (tmp_path / "made/model-00002-of-00003.safetensors").unlink()
    hub.add(REPOSITORY, tmp_path / "made")
    with pytest.raises(DataError, match=r"shard model-00002-of-00003\.safetensors is missing") as raised:
        open_checkpoint(SOURCE)
    assert SOURCE in raised.value.hint


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offline_takes_what_the_cache_has(layout, hub, tmp_path):
    publish(hub, tmp_path / "made", layout=layout)
    offline = Access(offline=True)
    with pytest.raises(SourceError, match="not in the Hub's cache") as raised:
        open_checkpoint(SOURCE, access=offline)
    assert "hf download org/name" in raised.value.hint
    fetch(open_checkpoint(SOURCE).remote.values(), Access())
    hub.forget()
    found = open_checkpoint(SOURCE, access=offline)
    assert set(found.tensors) == set(STATE)
    assert (hub.requests, found.remote) == ([], {})


def test_offline_by_the_environment(hub, tmp_path, monkeypatch):
    publish(hub, tmp_path / "made")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="offline"):
        open_checkpoint(SOURCE)
    assert hub.requests == []


def test_offline_with_a_shard_missing_in_the_cache_is_no_damage(hub, tmp_path):
    publish(hub, tmp_path / "made", layout="shards")
    found = open_checkpoint(SOURCE)
    fetch(list(found.remote.values())[:2], Access())
    with pytest.raises(SourceError, match="is not whole in the Hub's cache") as raised:
        open_checkpoint(SOURCE, access=Access(offline=True))
    assert "without --offline" in raised.value.hint


def test_where_the_hub_cannot_be_reached_the_cache_is_used_and_said(hub, tmp_path, monkeypatch, quick):
    publish(hub, tmp_path / "made")
    fetch(open_checkpoint(SOURCE).remote.values(), Access())
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    said = []
    found = open_checkpoint(SOURCE, access=Access(on_message=said.append))
    assert set(found.tensors) == set(STATE)
    assert said == [f"the Hub cannot be reached; what the cache has is used: {found.source}"]
    with pytest.raises(SourceError, match="cannot be fetched"):
        open_checkpoint("hf://org/other")


@pytest.mark.parametrize("answer", [
    b"<html>log in</html>", b"[]", b"{}", b"null", b'{"id": "org/name", "sha": null}', b'{"id": "a", "sha": "../.."}',
    b'[{"type": "file", "path": "model.safetensors", "size": "x", "oid": "y"}]', b'[{"type": "file"}]', b"[3]",
    b'[{"type": "file", "path": "model.safetensors", "size": 9, "oid": "../../x"}]',
    b'[{"type": "file", "path": "model.safetensors", "size": -1, "oid": "abc"}]',
])  # fmt: skip
@pytest.mark.parametrize("what", ["info", "tree"])
def test_answers_that_are_none_of_the_hubs_are_clean_errors(answer, what, hub, tmp_path):
    """A proxy's page is such an answer, or a server that is no Hub."""
    commit = publish(hub, tmp_path / "made")
    hub.answers["/revision/main" if what == "info" else f"/tree/{commit}"] = answer
    try:
        open_checkpoint(f"{SOURCE}@main")
    except FlexmergeError as error:
        assert error.exit_code in (3, 4)
    else:
        pytest.fail("taken for an answer")


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "a\\..\\b.json"])
def test_a_listing_with_paths_that_leave_is_refused_or_harmless(name, hub, tmp_path):
    publish(hub, tmp_path / "made")
    commit = hub.repositories[REPOSITORY].branches["main"]
    hub.repositories[REPOSITORY].commits[commit][name] = b"{}"
    try:
        open_checkpoint(SOURCE)
    except (DataError, SourceError, UsageError):
        pass
    inside = list(tmp_path.rglob("*evil*"))
    assert inside == []
