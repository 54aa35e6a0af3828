"""The README is run: every `$ ` command of its console blocks, in order, and its Python snippets."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    return [line.removeprefix("$ ").split("  #")[0].strip() for line in lines]


@pytest.mark.slow
def test_every_command_and_snippet_of_the_readme_runs(tmp_path: Path) -> None:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    recipe = next(block for block in blocks("yaml") if block.startswith("# recipe.yaml"))
    (tmp_path / "recipe.yaml").write_text(recipe)
    environment = {
        **os.environ,
        "FLEXMERGE_VENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    shown: set[str] = set()  # the quickstart's own commands are shown with their output, and run once, by it
    for command in commands():
        if command in shown:
            continue
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        shown |= {line.removeprefix("$ ") for line in done.stdout.splitlines() if line.startswith("$ ")}
    for number, snippet in enumerate(blocks("python")):
        path = tmp_path / f"snippet{number}.py"
        path.write_text(snippet)
        done = subprocess.run(
            [sys.executable, path.name], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{snippet}\n{done.stderr}"


def test_every_command_of_the_program_and_every_exit_code_is_in_the_readme() -> None:
    program = shutil.which("flexmerge", path=str(Path(sys.executable).parent)) or f"{sys.executable} -m flexmerge_cli"
    listed = subprocess.run([*program.split(), "--help"], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^  ([a-z]+) ", listed.split("Commands:")[1], re.MULTILINE)
    assert set(names) >= {"plan", "merge", "inspect", "export", "eval", "methods"}
    assert [name for name in names if f"flexmerge {name}" not in README] == []
    assert [code for code in (0, 1, 2, 3, 4, 5, 6, 130) if f"| {code} |" not in README] == []
