#!/usr/bin/env bash
# All checks, from nothing: makes .venv (or $FLEXMERGE_VENV), installs, then ruff, mypy, import contracts and pytest.
# `tests/run.sh fast` runs the checks and the fast tests alone, in an environment that is there already.
# All other arguments go to pytest: tests/run.sh tests/order -k linkage
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${FLEXMERGE_VENV:-.venv}
fast=
if [ "${1-}" = fast ]; then
  shift
  fast=yes
  set -- tests/order tests/residuals tests/family tests/test_docs.py --ignore tests/family/test_blocks.py -m 'not slow' "$@"
fi
if [ ! -x "$venv/bin/ruff" ] || [ -z "$fast" ]; then
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --no-compile --constraint tests/constraints.txt --editable '.[dev]'
fi
export PATH="$PWD/$venv/bin:$PATH"
case $venv in /*) export PATH="$venv/bin:$PATH" ;; esac
# Compile what is imported, once, beside no source: pip would compile all, and each program anew what pip did not.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-$(cd "$venv" && pwd)/pycache}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # tests run side by side, and so do the programs that they start
ruff check .
ruff format --check .
mypy
lint-imports
python -m pytest --numprocesses "${FLEXMERGE_TEST_PROCESSES:-2}" "$@"
