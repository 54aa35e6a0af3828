"""samples/ci: the script that plans, merges, gates and pushes, and the workflow and the container that run it."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from ..program import ROOT, fails

SAMPLE = ROOT / "samples/ci"


@pytest.mark.slow
def test_what_passes_its_gate_is_published_with_its_scores_and_nothing_else_is(hub, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/flexmerge").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flexmerge_cli "$@"\n')
    (tmp_path / "bin/flexmerge").chmod(0o755)
    hub.tokens["hf_writer"], hub.writers["hf_writer"] = {"org/packed"}, "org"
    environment = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1",
        "WORK": str(tmp_path / "build"), "PUSH_OPTIONS": "--private",
    }  # fmt: skip

    def publish(recipe):
        words = [SAMPLE / "publish.sh", recipe, "hf://org/packed"]
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    # With the sample's own sources, and little data.
    for name in ("recipe.yaml", "eval.yaml"):
        text = (SAMPLE / name).read_text().replace("../digits", str(ROOT / "samples/digits"))
        (tmp_path / name).write_text(text if name == "recipe.yaml" else f"{text}limit: 200\n")
    done = publish(tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\$ flexmerge (\w+)", done.stdout, re.MULTILINE) == ["plan", "merge", "push"]
    repository = hub.repositories["org/packed"]
    files = repository.commits[repository.branches["main"]]
    assert repository.private and json.loads(files["manifest.json"])["gate"]["max_mean_drop"] == "5%"
    assert re.search(r"^\| `digit` .* \| `accuracy` \| \d", files["README.md"].decode(), re.MULTILINE)
    hub.forget()
    text = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "strict.yaml").write_text(text.replace("auto, size: 2x", "average, size: 1x"))
    done = publish(tmp_path / "strict.yaml")
    assert done.returncode == 6 and "push" not in done.stdout
    assert hub.requests == []
    (tmp_path / "open.yaml").write_text(text.partition("gate:")[0])
    done = publish(tmp_path / "open.yaml")
    assert done.returncode == 2 and "no gate" in done.stderr


def test_the_workflow_and_the_container_run_the_script_with_files_that_are_there():
    workflow = yaml.safe_load((SAMPLE / "publish.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["publish"]["steps"] if "run" in step]
    script, recipe, target = steps[-1].split()
    assert (ROOT / script).is_file() and os.access(ROOT / script, os.X_OK) and (ROOT / recipe).is_file()
    assert all((ROOT / path).is_file() for path in workflow[True]["push"]["paths"])
    container = (SAMPLE / "Containerfile").read_text()
    copied = re.findall(r"^COPY (samples\S+)", container, re.MULTILINE)
    assert copied == [script] and 'ENTRYPOINT ["publish.sh"]' in container
    extras = set(re.findall(r"\[([\w,]+)\]'", container + "\n".join(steps)))
    named = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert {extra for group in extras for extra in group.split(",")} <= set(named)
    fails(4, "push", "no-such-bundle", target, says="no bundle at")
