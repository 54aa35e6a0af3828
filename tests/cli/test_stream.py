"""`--stream`: the same plan and bundle as from files on this disk, and no weight is stored."""

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch

from flexmerge_cli.checkpoint import stream
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint

from ..composites import PIPELINE, SENTENCES, write_pipeline, write_sentences
from ..families import LAYOUTS, Models, normal, plain, tuned, write_checkpoint, write_family
from ..program import fails, succeeds, tree


def large() -> Models:
    """Tensors larger and smaller than a request."""
    base = {f"layers.{number}.mlp.weight": normal(number, 300, 400) for number in range(3)}
    base |= {f"layers.{number}.norm.weight": normal(50 + number, 400) for number in range(3)}
    return Models(base=base, tasks={f"task{number}": tuned(base, number + 1) for number in range(3)})


@pytest.fixture
def small_requests(monkeypatch):
    """So that a small family takes many of them."""
    monkeypatch.setattr(stream, "MIN_REQUEST_BYTES", 1 << 16)
    monkeypatch.setattr(stream, "MAX_REQUEST_BYTES", 1 << 17)


def publish(hub, folders):
    for name, folder in {"base": folders.base, **folders.tasks}.items():
        hub.add(f"org/{name}", folder)
    tasks = [argument for name in folders.tasks for argument in ("--task", f"{name}=hf://org/{name}")]
    return ["--base", "hf://org/base", *tasks]


def measurements(path):
    """A plan without the names of its sources."""
    from flexmerge_cli import load_plan

    plan = load_plan(path)
    return plan.tensors, plan.order, [task.fingerprint for task in plan.tasks], [task.files for task in plan.tasks]


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "pt"])
def test_what_is_streamed_is_what_is_on_the_disk(layout, hub, tmp_path, small_requests):
    folders = write_family(tmp_path / "made", large(), layout=layout)
    arguments = publish(hub, folders)
    succeeds("plan", "-q", *arguments, "--stream", "-o", tmp_path / "plan.json")
    total = sum(path.stat().st_size for path in folders.root.rglob("*.safetensors"))
    if layout in ("file", "shards"):
        assert hub.weights_sent() == total, "each byte once"
    assert not [path for path in (tmp_path / "hub-cache").rglob("*") if path.suffix in (".safetensors", ".bin")]
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "local.json")
    assert measurements(tmp_path / "plan.json") == measurements(tmp_path / "local.json")
    every = (["--method", "emr"], ["--method", "ties", "--size", "2x"], [])
    for number, options in enumerate(every if layout == "file" else every[:1]):
        merge = [*options, "--threads", "2"]
        succeeds("merge", tmp_path / "plan.json", *merge, "--stream", "-o", tmp_path / f"streamed{number}")
        succeeds("merge", tmp_path / "local.json", *merge, "-o", tmp_path / f"local{number}")
        ours, local = tree(tmp_path / f"streamed{number}"), tree(tmp_path / f"local{number}")
        assert set(ours) == set(local)
        # Headers name the plan, whose sources differ; what is behind them does not.
        assert [
            name for name in ours if name.startswith("weights/") and data_of(ours[name]) != data_of(local[name])
        ] == []
    assert not [path for path in (tmp_path / "hub-cache").rglob("*") if path.suffix in (".safetensors", ".bin")]


def data_of(file: bytes) -> bytes:
    return file[8 + int.from_bytes(file[:8], "little") :]


def test_python_streams_too(hub, tmp_path, small_requests):
    from flexmerge_cli import make_plan, merge

    folders = write_family(tmp_path / "made", large())
    publish(hub, folders)
    make_plan("hf://org/base", {name: f"hf://org/{name}" for name in folders.tasks}, output=tmp_path / "p", stream=True)
    bundle = merge(tmp_path / "p", tmp_path / "bundle", stream=True)
    assert torch.equal(bundle.view("task0")["layers.0.norm.weight"], large().tasks["task0"]["layers.0.norm.weight"])
    assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))


def test_requests_are_few_and_large(hub, tmp_path, small_requests):
    folders = write_family(tmp_path / "made", large())
    arguments = publish(hub, folders)
    succeeds("plan", "-q", *arguments, "--stream", "-o", tmp_path / "plan.json")
    asked = [path for method, path, asked in hub.requests if asked is not None and path.startswith("/cdn/org/task0")]
    size = (folders.tasks["task0"] / "model.safetensors").stat().st_size
    tensors = 3
    assert len(asked) <= 2 + size // (1 << 17) + tensors + 1
    resolved = [path for method, path, asked in hub.requests if asked is not None and "/resolve/" in path]
    assert len(resolved) == 4, "a signed address is asked for once a file"


def test_a_signed_address_that_expires_is_asked_for_anew(hub, tmp_path, small_requests, monkeypatch):
    folders = write_family(tmp_path / "made", large())
    arguments = publish(hub, folders)
    succeeds("plan", "-q", *arguments, "--stream", "-o", tmp_path / "plan.json")
    hub.signature = 7
    succeeds("merge", tmp_path / "plan.json", "--method", "average", "--stream", "-o", tmp_path / "bundle")
    succeeds("inspect", tmp_path / "bundle", "--verify")
    assert hub.leaked == []


def test_connections_that_break_do_not_show(hub, tmp_path, small_requests, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    folders = write_family(tmp_path / "made", large())
    arguments = publish(hub, folders)
    hub.cuts["org/task1/model.safetensors"] = [10, 0, 1000, 70_000, 5]
    succeeds("plan", "-q", *arguments, "--stream", "-o", tmp_path / "plan.json")
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "local.json")
    assert measurements(tmp_path / "plan.json") == measurements(tmp_path / "local.json")


def test_a_source_that_breaks_for_good_is_told_and_nothing_is_left(hub, tmp_path, small_requests, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    folders = write_family(tmp_path / "made", large())
    arguments = publish(hub, folders)
    succeeds("plan", "-q", *arguments, "--stream", "-o", tmp_path / "plan.json")
    hub.cuts["org/task1/model.safetensors"] = [10_000_000] * 2 + [0] * 1000
    fails(4, "merge", tmp_path / "plan.json", "--stream", "-o", tmp_path / "bundle", says="org/task1")
    assert not [path for path in tmp_path.iterdir() if "bundle" in path.name]


def test_what_the_cache_has_is_read_there(hub, tmp_path):
    arguments = publish(hub, write_family(tmp_path / "made", plain()))
    succeeds("plan", *arguments, "-o", tmp_path / "plan.json", "-q")
    hub.forget()
    succeeds("merge", tmp_path / "plan.json", "--stream", "-o", tmp_path / "bundle")
    assert hub.requests == []


def test_max_memory_bounds_what_is_held(hub, tmp_path, small_requests, monkeypatch):
    folders = write_family(tmp_path / "made", large())
    arguments = publish(hub, folders)
    pools = []
    kept = stream.StreamPool.__init__

    def noted(pool, *given):
        kept(pool, *given)
        pools.append(pool)

    monkeypatch.setattr(stream.StreamPool, "__init__", noted)
    succeeds(
        "plan", "-q", *arguments, "--stream", "--max-memory", "200MiB", "--threads", "1", "-o", tmp_path / "plan.json"
    )
    (pool,) = pools
    assert pool.max_bytes == (200 << 20) // 3
    assert 0 < pool.most_bytes <= pool.max_bytes
    fails(2, "plan", *arguments, "--stream", "--max-memory", "20MiB", "-o", tmp_path / "x.json", says="--max-memory")


def test_a_tensor_that_is_not_stored_row_by_row_is_refused(hub, tmp_path):
    write_checkpoint(tmp_path / "odd", {"a": normal(0, 4, 6).T, "b": normal(1, 4)}, layout="bin")
    hub.add("org/odd", tmp_path / "odd")
    given = ["--base", "hf://org/odd", "--task", "a=hf://org/odd"]
    done = fails(2, "plan", *given, "--stream", "-o", tmp_path / "plan.json", says="cannot be streamed")
    assert "leave out --stream" in done.err


# Other addresses.


@pytest.fixture(params=["listed", "unlisted"])
def web(request, tmp_path):
    """A web server with ranges, with and without lists of its folders; its root, and its address."""
    pytest.importorskip("aiohttp")

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def list_directory(self, path):
            if request.param == "listed":
                return super().list_directory(path)
            self.send_error(404)
            return None

        def do_GET(self):
            asked, path = self.headers.get("Range"), self.translate_path(self.path)
            if asked is None or not path.endswith((".safetensors", ".bin", ".json", ".txt")):
                return super().do_GET()
            try:
                data = Path(path).read_bytes()
            except OSError:
                return self.send_error(404)
            start, stop = (int(part) for part in asked.removeprefix("bytes=").split("-"))
            part = data[start : stop + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
            self.end_headers()
            return self.wfile.write(part)

    root = tmp_path / "web"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(root)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield root, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def bucket():
    """An object store in memory."""
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def test_a_web_server_is_a_source(web, tmp_path):
    root, address = web
    folders = write_family(root, plain(), layout="shards")
    tasks = [argument for name in folders.tasks for argument in ("--task", f"{name}={address}/tasks/{name}")]
    given = ["--base", f"{address}/base", *tasks]
    shown = succeeds("inspect", f"{address}/tasks/task0", "--json").json
    assert shown["side_files"] == ["README.md", "config.json", "vocab.txt"]
    succeeds("plan", "-q", *given, "--dry-run")
    done = fails(2, "plan", *given, "-o", tmp_path / "plan.json", says="can only be streamed")
    assert "hint: add --stream" in done.err
    succeeds("plan", "-q", *given, "--stream", "-o", tmp_path / "plan.json")
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "local.json")
    assert measurements(tmp_path / "plan.json") == measurements(tmp_path / "local.json")
    succeeds("merge", tmp_path / "plan.json", "--method", "average", "--size", "2x", "--stream", "-o", tmp_path / "b")
    succeeds("inspect", tmp_path / "b", "--verify")
    fails(4, "plan", *given, "--offline", "--stream", "-o", tmp_path / "x.json", says="offline")
    fails(4, "inspect", f"{address}/nothing", says="no checkpoint")
    shard = f"{address}/base/model-00001-of-00003.safetensors"
    fails(2, "inspect", shard, says=f"{shard} is one of the 3 shards of a model")
    fails(4, "inspect", f"{address}/base/other.safetensors", says="other.safetensors")


def test_an_object_store_is_a_source(bucket, tmp_path):
    folders = write_family(tmp_path / "made", plain())
    bucket.put(str(folders.root), "/models", recursive=True)
    tasks = [argument for name in folders.tasks for argument in ("--task", f"{name}=memory://models/tasks/{name}")]
    given = ["--base", "memory://models/base", *tasks]
    succeeds("plan", "-q", *given, "--stream", "-o", tmp_path / "plan.json")
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "local.json")
    assert measurements(tmp_path / "plan.json") == measurements(tmp_path / "local.json")
    succeeds("merge", tmp_path / "plan.json", "--method", "emr", "--stream", "-o", tmp_path / "bundle")
    bucket.pipe("/models/tasks/task0/model.safetensors", (folders.tasks["task1"] / "model.safetensors").read_bytes())
    fails(3, "merge", tmp_path / "plan.json", "--stream", "-o", tmp_path / "other", says="has changed since the plan")


@pytest.mark.parametrize("kind", ["sentences", "pipeline"])
def test_a_composite_on_a_web_server_or_in_a_store_is_one_on_this_disk(kind, web, bucket):
    root, address = web
    write, parts = {"sentences": (write_sentences, SENTENCES), "pipeline": (write_pipeline, PIPELINE)}[kind]
    found = open_checkpoint(str(write(root / "m", parts)))
    bucket.put(str(root / "m"), "/models/m", recursive=True)
    (root / "m/optimizer.pt").write_text("x")
    for source in (f"{address}/m", "memory://models/m"):
        there = open_checkpoint(source)
        assert (list(there.tensors), there.parts) == (list(found.tensors), found.parts)
        assert set(there.side_files) == set(found.side_files)
        texts = [path.read_text() for path in there.side_files.values()]
        assert texts == [path.read_text() for path in found.side_files.values()]
        assert there.left in ({}, {"training": ("optimizer.pt",)})  # nobody asks for it where nothing is listed


def test_a_server_that_lists_nothing_is_asked_for_the_parts_that_the_indices_name(web, tmp_path):
    root, address = web
    write_sentences(root / "m", SENTENCES)
    (root / "m/index.html").write_text("no list")
    for folder in ("m/2_Dense", "m/3_LayerNorm", "m/1_Pooling"):
        (root / folder / "index.html").write_text("no list")
    there = open_checkpoint(f"{address}/m")
    assert set(there.parts) == {"2_Dense", "3_LayerNorm"} and "1_Pooling/config.json" in there.side_files


@pytest.mark.parametrize(("source", "code", "says"), [
    ("nosuch://bucket/x", 2, "not a source that flexmerge supports"),
    ("https://me:secret@127.0.0.1/x", 2, "a password or a query in it"),
    ("memory://nothing/there", 4, "no checkpoint in"),
    ("s3://bucket/x", 4, "flexmerge-cli[stream]"),
])  # fmt: skip
def test_addresses_that_cannot_be_had(source, code, says, monkeypatch):
    if source.startswith("s3"):
        import fsspec.registry

        def missing(*_args, **_more):
            raise ImportError("Install s3fs to access S3")

        monkeypatch.setattr(fsspec.core, "get_filesystem_class", missing)
    fails(code, "inspect", source, says=says)


def test_paths_of_an_address_stay_in_their_folder(bucket, tmp_path):
    from flexmerge_cli.checkpoint.urls import UrlFolder

    folder = UrlFolder("memory://a/../../../../etc", bucket)
    assert "etc" in folder.path.parts and ".." not in folder.path.parts


def test_what_a_store_lists_and_what_lies_beside_weights_is_bounded(bucket, tmp_path, monkeypatch):
    from flexmerge_cli.checkpoint import urls

    folders = write_family(tmp_path / "made", plain())
    bucket.put(str(folders.base), "/models/base", recursive=True)
    monkeypatch.setattr(urls, "MAX_ENTRIES", 0)
    fails(4, "inspect", "memory:///models/base", says="no checkpoint has more than 0")
    monkeypatch.undo()
    bucket.pipe("/models/base/config.json", b" " * 101)
    monkeypatch.setattr(urls, "MAX_SMALL_BYTES", 100)
    fails(3, "inspect", "memory:///models/base", says="config.json has more than 100 bytes")
