"""README, CONTRIBUTING and docs are run: their commands and Python snippets in order, each page in a folder of its own.

A fence is run unless a comment above it says why not: `<!-- not run: it needs a GPU -->`. `<!-- file: NAME -->` above a
fence puts its text at NAME. In `console` the lines behind `$ ` are commands and the rest is output; `bash` is commands
alone. Pages find the samples, with little evaluation data, and what PLACES puts beside them.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .adapters import LORA, make
from .families import plain, write_family
from .forked import forked_program
from .program import ROOT, flexmerge, succeeds

FENCE = re.compile(r"(?:^<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"[|<>&;$=*]")  # outside quotes: not a plain command
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
EXAMPLES = 160  # of each task of the digits: enough for a gate of 5 %


@dataclass(frozen=True)
class Fence:
    mark: str
    language: str
    text: str

    @property
    def file(self) -> str | None:
        return self.mark.removeprefix("file: ") if self.mark.startswith("file: ") else None

    @property
    def runs(self) -> bool:
        return self.language in ("console", "bash", "python") and not self.mark

    @property
    def commands(self) -> list[str]:
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def fences(text: str) -> list[Fence]:
    return [Fence(mark or "", language, text) for mark, language, text in FENCE.findall(text)]


def place_samples(folder: Path) -> None:
    """The samples, the digits' data cut to a few examples, and those models under the names of one's own."""
    (folder / "samples").mkdir()
    for path in (ROOT / "samples").iterdir():
        if path.name != "digits":
            (folder / "samples" / path.name).symlink_to(path)
    digits = folder / "samples" / "digits"
    digits.mkdir()
    for path in (ROOT / "samples" / "digits").iterdir():
        if path.name != "eval.yaml":
            (digits / path.name).symlink_to(path)
    spec = (ROOT / "samples" / "digits" / "eval.yaml").read_text()
    (digits / "eval.yaml").write_text(f"{spec}limit: {EXAMPLES}\n")


def place_own_models(folder: Path, _hub: object) -> None:
    """base/, finetuned/ and an eval.yaml."""
    (folder / "base").symlink_to(folder / "samples" / "digits" / "base")
    (folder / "finetuned").symlink_to(folder / "samples" / "digits" / "tasks")
    spec = (folder / "samples" / "digits" / "eval.yaml").read_text()
    spec = spec.replace("data: test/", "data: samples/digits/test/")
    (folder / "eval.yaml").write_text(spec.replace("checkpoint: tasks/", "checkpoint: finetuned/"))


def place_adapters(folder: Path, _hub: object) -> None:
    """base/, adapters/cola and adapters/sst2 of one rank, and finetuned/."""
    modules = ["q_proj", "v_proj"]
    lora = {name: LORA(r=4, lora_alpha=8, target_modules=modules) for name in ("cola", "sst2")}
    made = make(folder, "llama", lora)
    made.tasks.rename(folder / "adapters")
    made.full("whole", 1)
    (folder / "full" / "whole").rename(folder / "finetuned")


def place_hub(folder: Path, hub: object) -> None:
    """org/base, org/cola and org/sst2, whose tag v2 has its checkpoint in a folder, and org/bundle."""
    models = plain(num_tasks=2)
    models.tasks = dict(zip(("cola", "sst2"), models.tasks.values()))
    made = write_family(folder / "made", models)
    for name, path in {"base": made.base, **made.tasks}.items():
        hub.add(f"org/{name}", path)  # type: ignore[attr-defined]
    inside = {f"checkpoint/{path.name}": path.read_bytes() for path in made.tasks["sst2"].iterdir()}
    hub.add("org/sst2", inside, branch="v2")  # type: ignore[attr-defined]
    succeeds("plan", *made.arguments, "-o", folder / "made" / "plan.json")
    succeeds("merge", folder / "made" / "plan.json", "-o", folder / "made" / "bundle")
    hub.add("org/bundle", folder / "made" / "bundle")  # type: ignore[attr-defined]


PLACES: dict[str, Callable[[Path, object], None]] = {
    "README.md": place_own_models,
    "docs/adapters.md": place_adapters,
    "docs/hub.md": place_hub,
    "docs/scale.md": place_own_models,
}


@pytest.fixture
def page(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The text of a page, in a folder where it can be run."""
    name: str = request.param
    place_samples(tmp_path)
    hub = request.getfixturevalue("hub") if name == "docs/hub.md" else None
    PLACES.get(name, lambda _folder, _hub: None)(tmp_path, hub)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'venv/bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FLEXMERGE_VENV", str(tmp_path / "venv"))
    with forked_program(tmp_path / "venv/bin"):
        yield (ROOT / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, indirect=True)
def test_every_command_and_snippet_of_a_page_runs(page: str) -> None:
    shown: set[str] = set()  # a script's own commands are shown with their output, and run once, by it
    for fence in fences(page):
        if fence.file is not None:
            Path(fence.file).write_text(fence.text)
        elif fence.runs and fence.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(fence.text, "snippet", "exec"), {"__name__": "snippet"})
        elif fence.runs:
            for command in (command for command in fence.commands if command not in shown):
                printed = _run(command)
                shown |= {line.removeprefix("$ ") for line in printed.splitlines() if line.startswith("$ ")}


def _run(command: str) -> str:
    """What it prints. In this process where that will do: importing torch takes seconds."""
    words = shlex.split(command, comments=True)
    if words[0] == "flexmerge" and not SHELL.search(re.sub(r"'[^']*'|#.*|[\w-]+[:=][^ ]*", "", command)):
        done = flexmerge(*words[1:])
        code, said = done.code, done.out + done.err
    else:
        ran = subprocess.run(["bash", "-ec", command], capture_output=True, text=True)
        code, said = ran.returncode, ran.stdout + ran.stderr
    assert code == 0, f"{command}\n{said}"
    return said


def test_a_fence_that_is_not_run_says_why() -> None:
    marks = [fence.mark for page in PAGES for fence in fences((ROOT / page).read_text()) if fence.mark]
    assert marks and all(mark.startswith(("file: ", "not run: ", "shown: ")) for mark in marks), marks
