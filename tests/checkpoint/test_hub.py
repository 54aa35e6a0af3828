"""`hf://` without a network: what is refused before one is needed, and what is told where there is none."""

import pytest

from flexmerge_cli.checkpoint.hub import is_hub, resolve_hub
from flexmerge_cli.errors import SourceError, UsageError


@pytest.mark.parametrize(("source", "hub"), [
    ("hf://org/name", True), ("http://org/name", True), ("s3://x", True), ("org/name", False), ("./hf:/x", False),
    ("/hf://x", False), ("C:/x", False), ("HF://x/y", False),
])  # fmt: skip
def test_only_a_scheme_is_no_path(source, hub):
    assert is_hub(source) == hub


@pytest.mark.parametrize("source", [
    "hf://name", "hf://", "http://org/name", "hf://org/name:../x", "hf://org/name:a/../../x", "hf://org/name@../../x",
    "hf://../name", "hf://a..b/c", "hf://org/name@", "hf://org/na me", "hf://org/name:a@b",
])  # fmt: skip
def test_what_cannot_be_a_repository_is_refused_without_a_network(source):
    with pytest.raises(UsageError):
        resolve_hub(source)


def test_offline_is_told_with_the_command_that_helps(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="cannot be fetched") as raised:
        resolve_hub("hf://flexmerge-tests/there-is-none@abc")
    assert "hf download flexmerge-tests/there-is-none" in raised.value.hint
