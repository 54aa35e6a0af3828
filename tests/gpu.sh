#!/usr/bin/env bash
# All checks that need a GPU, in under eight minutes: the tests marked `cuda`, then results and times beside the CPU's as
# one table: every method, plan, merge, bandwidth of views and loading beside copies, and serving. Needs what `pip install '.[dev]'` needs,
# with a torch for CUDA. $PYTHON is the interpreter, $FLEXMERGE_BENCH_FOLDER (6 GB) where families are made.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
"$python" - <<'CHECK'
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"error: no CUDA device: torch {torch.__version__} sees none\nhint: run it on a machine with a GPU")
print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
CHECK
"$python" -m pytest -q -m cuda tests
"$python" -m tests.bench_gpu --device cuda --folder "${FLEXMERGE_BENCH_FOLDER:-/tmp/flexmerge-bench}"
