"""The program itself: what it takes to say its name."""

import json
import subprocess
import sys

import pytest

from flexmerge_cli.version import VERSION
from tests.families import plain, write_family
from tests.program import succeeds

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


PROGRAM = """
import json, sys
from flexmerge_cli.cli.app import run
for line in json.load(sys.stdin):
    code = run(line.split())
    print(json.dumps([code, line, "torch" in sys.modules]), file=sys.stderr)
"""
MERGE = "merge {plan} -o {new} --size 2.5x"
COMPUTES_NOTHING = [
    (0, "methods"),
    (0, "methods ties"),
    (0, "methods fw_merging"),
    (0, "plan --base {base} --tasks {tasks} --dry-run"),
    (0, "inspect {plan}"),
    (0, "inspect {base}"),
    (0, f"{MERGE} --method auto --dry-run"),
    (0, f"{MERGE} --method ties --step trim:K=0.3 --calibrate svc --dry-run"),
    (0, f"{MERGE} --method emr --dry-run"),
    (2, f"{MERGE} --method tise"),
    (2, f"{MERGE} --method ties:K=2"),
    (2, f"{MERGE} --method ties --step trim:no=1"),
    (2, "merge {plan} -o {new} --method average --size much"),
    (2, "plan --base {base} --tasks {tasks} -o {new} --method mine.py"),
    (4, "plan --base {new} --tasks {new} -o {new}.json"),
]


def test_what_computes_nothing_does_not_import_torch(tmp_path):
    folders = write_family(tmp_path, plain())
    places = {
        "base": folders.base,
        "tasks": tmp_path / "tasks",
        "plan": tmp_path / "plan.json",
        "new": tmp_path / "new",
    }
    succeeds("plan", "--base", folders.base, "--tasks", places["tasks"], "-o", places["plan"])
    asked = [(code, line.format(**places)) for code, line in COMPUTES_NOTHING]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([line for _, line in asked]),
        capture_output=True,
        text=True,
        check=False,
    )
    found = [tuple(json.loads(line)) for line in done.stderr.splitlines() if line.startswith("[")]
    assert found == [(code, line, False) for code, line in asked], done.stderr
