"""`--workers ray`: plan and bundle of one process, from a cluster of two nodes, one of which is removed meanwhile."""

import shutil
import threading
import time

import pytest

from flexmerge_cli.cli.workers import part_words

from ..families import plain, write_family
from ..program import fails, succeeds, tree


def test_a_part_gets_the_words_of_the_command_but_those_of_the_join():
    words = ["plan.json", "--workers", "ray:x", "--method", "average", "--html=x.html", "--threads", "2", "-o", "b"]
    assert part_words(words, of_plan=False) == ["plan.json", "--method", "average", "-o", "b"]
    assert part_words(words, of_plan=True) == ["plan.json", "-o", "b"]
    assert part_words(["--base", "--all-methods"], of_plan=True) == ["--base"]


def test_what_is_no_cluster_is_refused(tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=2, layers=1))
    words = ("plan", *folders.arguments, "-o", tmp_path / "plan.json", "--workers")
    fails(2, *words, "slurm", says="--workers slurm is no cluster")
    fails(2, *words, "ray", "--part", "1/2", says="--workers has no effect beside --part")
    fails(2, *words, "ray", "--dry-run", says="--dry-run has no effect beside --workers")


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
