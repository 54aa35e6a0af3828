"""Only checkpoint/ reads from a network, and only when a source is elsewhere; a push and a server use one as well."""

import ast
import subprocess
import sys
from pathlib import Path

import flexmerge_cli

PACKAGE = Path(flexmerge_cli.__file__).parent
USES = {"bundle/push.py", "server/run.py"}
NETWORK = {"huggingface_hub", "fsspec", "httpx", "httpx2", "requests", "aiohttp", "socket", "http", "urllib3"}


def imported(path: Path) -> set[str]:
    """First segments of all that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add("urllib3" if node.module == "urllib.request" else node.module.partition(".")[0])
    return found


def test_no_other_part_imports_what_reaches_a_network():
    outside = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "checkpoint" not in path.parents]
    assert len(outside) > 100
    assert {path.relative_to(PACKAGE).as_posix() for path in outside if imported(path) & NETWORK} == USES


def test_nothing_of_it_is_imported_for_files_of_this_disk(family):
    code = (
        "import sys; from flexmerge_cli.cli.app import run\n"
        f"assert run(['inspect', {str(family.tasks['task0'])!r}, '-q']) == 0\n"
        "sys.exit(bool({'huggingface_hub', 'fsspec', 'aiohttp'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stdout + done.stderr
