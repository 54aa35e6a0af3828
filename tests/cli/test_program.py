"""The program itself: what it takes to say its name."""

import subprocess
import sys

import pytest

from flexmerge_cli.version import VERSION

HEAVY = {"torch", "numpy", "pydantic", "yaml", "transformers", "huggingface_hub", "rich"}


@pytest.mark.parametrize(
    ("argument", "says"), [("--version", f"{VERSION}\n"), ("--help", "Usage: "), ("-h", "Usage: ")]
)
def test_help_and_version_import_nothing_heavy(argument, says):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from flexmerge_cli.cli.app import run; code = run(sys.argv[1:]);"
            f"print({HEAVY - {'rich'} if says == 'Usage: ' else HEAVY} & set(sys.modules) or '', file=sys.stderr);"
            "sys.exit(code)",  # rich draws the panels of the help
            argument,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert says in done.stdout


def test_a_plan_of_sources_that_are_not_there_is_refused_before_torch_is_imported(tmp_path):
    program = (
        "import sys; from flexmerge_cli.cli.app import run; code = run(sys.argv[1:]);"
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    arguments = ["plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "plan.json"]
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, check=False)
    assert done.returncode == 4
