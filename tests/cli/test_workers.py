"""`--workers ray`: plan and bundle of one process, from a cluster of two nodes, one of which is removed meanwhile."""

import contextlib
import shutil
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from flexmerge_cli.cli.workers import Workers, named_paths, part_words
from flexmerge_cli.errors import SourceError, UsageError

from ..families import plain, write_family
from ..program import fails, succeeds, tree


def test_a_part_gets_the_words_of_the_command_but_those_of_the_join():
    words = ["plan.json", "--workers", "ray:x", "--method", "average", "--html=x.html", "--threads", "2", "-o", "b"]
    assert part_words(words, of_plan=False) == ["plan.json", "--method", "average", "-o", "b"]
    assert part_words(words, of_plan=True) == ["plan.json", "-o", "b"]
    assert part_words(["--base", "--all-methods"], of_plan=True) == ["--base"]


def test_every_file_that_a_part_reads_must_be_seen_by_the_nodes(tmp_path, monkeypatch):
    """A calibration, a table for the card or a method's file on this disk alone failed late, on a node."""
    asked = []

    @contextlib.contextmanager
    def of(_text, **_run):
        yield SimpleNamespace(check=lambda paths: asked.extend(paths) or blind())

    def blind():
        raise SourceError("node 10.0.0.2 of the cluster does not see it", hint="mount it")

    monkeypatch.setattr(Workers, "of", of)
    folders = write_family(tmp_path, plain(num_tasks=2, layers=1))
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    (tmp_path / "own.py").write_text("")
    (tmp_path / "moved").mkdir()
    words = ("merge", tmp_path / "plan.json", "--workers", "ray", "-o", tmp_path / "b")
    fails(4, *words, f"--relocate={tmp_path}/old={tmp_path}/moved", says="does not see")
    for path in (tmp_path / "plan.json", tmp_path / "moved", folders.base, *folders.tasks.values()):
        assert path in asked
    named = named_paths(["--method", f"{tmp_path}/own.py#m:scale=@{tmp_path}/plan.json", "--size", "2x", "--none"])
    assert named == [tmp_path / "own.py", tmp_path / "plan.json"]
    fails(4, "plan", *folders.arguments, "-o", tmp_path / "p.json", "--workers", "ray", says="does not see")


def test_what_is_no_cluster_is_refused(tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=2, layers=1))
    words = ("plan", *folders.arguments, "-o", tmp_path / "plan.json", "--workers")
    fails(2, *words, "slurm", says="--workers slurm is no cluster")
    fails(2, *words, "ray", "--part", "1/2", says="--workers has no effect beside --part")
    fails(2, *words, "ray", "--dry-run", says="--dry-run has no effect beside --workers")


@pytest.mark.parametrize(("nodes", "device", "threads", "found"), [
    ([(8, 0), (4, 0)], "auto", None, ("cpu", 4, 6)),
    ([(8, 0), (4, 0)], "auto", 8, ("cpu", 8, 2)),
    ([(8, 0), (4, 0)], "auto", 9, "--threads 9: no node of the Ray cluster has more than 8"),
    ([(8, 0)], "cuda", None, "no node of the Ray cluster has a GPU"),
    ([(32, 4), (16, 1)], "auto", None, ("cuda", 8, 10)),
    ([(32, 4), (16, 0)], "cuda", None, ("cuda", 8, 8)),
    ([(2, 4)], "cuda", None, ("cuda", 1, 4)),
    ([(32, 4)], "cuda", 16, ("cuda", 16, 4)),
])  # fmt: skip
def test_no_part_waits_for_what_no_node_has(nodes, device, threads, found, monkeypatch):
    """Ray waits without end for a node with more processors than any has, or with a GPU."""
    ray = ModuleType("ray")
    ray.init, ray.shutdown = lambda **_options: None, lambda: None
    ray.nodes = lambda: [{"Alive": True, "Resources": {"CPU": float(cpu), "GPU": float(gpu)}} for cpu, gpu in nodes]
    monkeypatch.setitem(sys.modules, "ray", ray)
    if isinstance(found, str):
        with pytest.raises(UsageError, match=found), Workers.of("ray", device=device, threads=threads):
            pass
        return
    with Workers.of("ray", device=device, threads=threads) as cluster:
        assert (cluster.device, cluster.threads, cluster.count) == found


@pytest.fixture
def cluster():
    """Two nodes of one core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.mark.slow
def test_a_cluster_makes_the_same_bytes_even_if_a_node_is_removed_in_the_middle(cluster, tmp_path, monkeypatch):
    folders = write_family(tmp_path, plain(num_tasks=3, layers=12, width=64))
    monkeypatch.chdir(tmp_path)
    workers = ("--workers", f"ray:{cluster.address}")
    succeeds("plan", *folders.arguments, "-o", "alone.json")
    succeeds("plan", *folders.arguments, "-o", "plan.json", *workers)
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    merge = ("merge", "plan.json", "--method", "auto", "--size", "1.5x", "-o")
    succeeds(*merge, "alone")

    was_there = []

    def remove() -> None:
        while not list(tmp_path.glob(".b.partial/.journal-*")):
            time.sleep(0.01)
        was_there.append((tmp_path / "b").exists())
        cluster.remove_node(max(cluster.worker_nodes, key=id), allow_graceful=False)

    removing = threading.Thread(target=remove)
    removing.start()
    succeeds(*merge, "b", *workers)
    removing.join()
    assert was_there == [False]
    assert tree(tmp_path / "b") == tree(tmp_path / "alone")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    fails(2, "merge", "plan.json", "--method", "average", "--size", "9x", "-o", "c", *workers)


@pytest.mark.slow
def test_a_path_that_a_node_does_not_see_is_named(cluster, tmp_path, monkeypatch):
    from flexmerge_cli.cli import workers

    folders = write_family(tmp_path, plain(num_tasks=2, layers=1))
    monkeypatch.setattr(workers, "_missing", lambda paths: [path for path in paths if path.endswith("/base")])
    words = ("plan", *folders.arguments, "-o", tmp_path / "plan.json", "--workers", f"ray:{cluster.address}")
    fails(4, *words, says=("does not see", str(folders.base)))
    monkeypatch.undo()
    shutil.rmtree(folders.base)
    fails(4, *words, says="base")
    assert not (tmp_path / "plan.json").exists()
