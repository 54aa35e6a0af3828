"""A Hub that means harm: what it answers is bounded, and the token stays with the host that it is for."""

import itertools

import pytest

from flexmerge_cli.checkpoint import hub as client
from flexmerge_cli.checkpoint import ranges
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.errors import SourceError

from ..families import plain, write_checkpoint
from . import hub_server


@pytest.fixture
def repository(hub, tmp_path):
    write_checkpoint(tmp_path / "made", plain(num_tasks=1).base)
    hub.add("org/model", tmp_path / "made")
    return hub


def answer_trees(monkeypatch, answer):
    """answer: number of the page -> entries, and the address of the next."""
    pages = itertools.count()

    def tree(self, *_):
        entries, following = answer(next(pages), self)
        return self._json(entries, {"Link": f'<{following}>; rel="next"'})

    monkeypatch.setattr(hub_server._Handler, "_tree", tree)


def folder(number):
    return {"type": "directory", "path": f"x{number}", "oid": "0" * 40}


def test_a_listing_without_end_is_given_up(repository, monkeypatch):
    monkeypatch.setattr(client, "MAX_PAGES", 20)
    answer_trees(monkeypatch, lambda page, server: ([folder(page)], f"{repository.url}{server.path}"))
    with pytest.raises(SourceError, match="does not end: 20 entries"):
        open_checkpoint("hf://org/model")


def test_a_page_without_end_is_given_up(repository, monkeypatch):
    monkeypatch.setattr(client, "MAX_PAGE_BYTES", 10_000)
    answer_trees(monkeypatch, lambda page, server: ([folder(i) for i in range(1000)], ""))
    with pytest.raises(SourceError, match="does not end"):
        open_checkpoint("hf://org/model")


@pytest.mark.parametrize(
    "following", ["http://localhost:{port}/api/x", "https://127.0.0.1:{port}/x", "http://x@evil.test/"]
)
def test_the_next_page_is_never_asked_of_another_host(following, repository, monkeypatch):
    """It would get the token."""
    address = following.format(port=repository.url.rpartition(":")[2])
    answer_trees(monkeypatch, lambda page, server: ([folder(page)], address))
    with pytest.raises(SourceError, match="another host"):
        open_checkpoint("hf://org/model")
    assert not repository.leaked


def test_an_answer_of_three_bytes_at_a_time_is_given_up(repository, monkeypatch):
    monkeypatch.setattr(ranges, "WAIT_SECONDS", 0.001)
    repository.cuts["org/model/model.safetensors"] = [3] * 1000
    with pytest.raises(SourceError):
        open_checkpoint("hf://org/model")
    asked = [path for method, path, _ in repository.requests if method == "GET" and "safetensors" in path]
    assert len(asked) < 30


def test_an_answer_that_trickles_is_given_up(repository, monkeypatch):
    monkeypatch.setattr(ranges, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(ranges, "SLOW_BYTES_PER_SECOND", 10**12)
    with pytest.raises(SourceError, match="sends too slowly"):
        open_checkpoint("hf://org/model")
