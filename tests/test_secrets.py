"""No user, password or query of an address gets into a message or a file."""

import pytest

from flexmerge_cli.errors import SourceError, without_secrets

from .families import plain, write_family
from .program import flexmerge


@pytest.mark.parametrize(("text", "shown"), [
    ("https://me:secret@host/a/b?token=secret#secret is not there", "https://host/a/b is not there"),
    ("no checkpoint at /here/HTTPS:/secret@host/x?y=secret", "no checkpoint at /here/HTTPS:/host/x"),
    ("`s3://key:secret@bucket/x` and `hf://secret@org/name`", "`s3://bucket/x` and `hf://org/name`"),
    ("write hf://org/name[@revision][:folder]", "write hf://org/name[@revision][:folder]"),
    ("hf://org/name@main:sub/x.bin, is it there?", "hf://org/name@main:sub/x.bin, is it there?"),
    ("a@b: what? /tmp/x@y?z", "a@b: what? /tmp/x@y?z"),
])  # fmt: skip
def test_addresses_are_told_by_scheme_host_and_path(text, shown):
    assert without_secrets(text) == SourceError(text).message == str(SourceError(text)) == shown
    assert SourceError("x", hint=text).hint == shown


@pytest.mark.parametrize("address", [
    "https://me:s3cr3t@127.0.0.1:9/model", "https://s3cr3t@127.0.0.1:9/model", "s3://key:s3cr3t@bucket/model",
    "https://127.0.0.1:9/model.safetensors?token=s3cr3t", "https://127.0.0.1:9/model?X-Amz-Signature=s3cr3t",
    "hf://me:s3cr3t@org/name", "hf://org/name?token=s3cr3t", "HTTPS://me:s3cr3t@127.0.0.1:9/model",
    "https://127.0.0.1:9/model#s3cr3t",
])  # fmt: skip
def test_no_command_tells_or_keeps_a_secret(address, tmp_path):
    folders = write_family(tmp_path / "made", plain(num_tasks=2))
    (tmp_path / "recipe.yaml").write_text(f"version: 1\nbase: '{address}'\ntasks: {{a: '{address}'}}\n")
    for command in (
        ("inspect", address),
        ("plan", "--base", folders.base, "--task", f"a={address}", "-o", tmp_path / "plan.json"),
        ("plan", "--base", address, *folders.arguments[2:], "-o", tmp_path / "plan.json"),
        ("plan", tmp_path / "recipe.yaml", "-o", tmp_path / "plan.json"),
        ("export", address, "--task", "a", "-o", tmp_path / "e"),
    ):
        for more in ((), ("--json",)):
            result = flexmerge(*command, *more)
            assert result.code in (2, 3, 4), (command, result.err)
            assert "s3cr3t" not in result.out + result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "recipe.yaml"]
