#!/usr/bin/env bash
# Eight fine-tuned models into the bytes of one model, and into 2.25x; a look into a bundle, a model back, and scores.
# Makes a virtual environment (build/quickstart/venv, or $FLEXMERGE_VENV) and writes below build/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
work=build/quickstart
venv=${FLEXMERGE_VENV:-$work/venv}
mkdir -p "$work"
. samples/environment.sh eval
run flexmerge plan --base samples/digits/base --tasks samples/digits/tasks -o "$work/plan.json" --force
# The least predicted damage that fits into the bytes of one model, chosen per tensor.
run flexmerge merge "$work/plan.json" --method auto --size 1x -o "$work/auto" --force
run flexmerge eval "$work/auto" --spec samples/digits/eval.yaml
# Block merging, as in the FlexMerge paper: dense models that load as they lie.
run flexmerge merge "$work/plan.json" --method task_arithmetic:scale=1.5 --size 2.25x -o "$work/bundle" --force
run flexmerge inspect "$work/bundle"
run flexmerge export "$work/bundle" --task digit -o "$work/digit" --force
run flexmerge eval "$work/bundle" --spec samples/digits/eval.yaml
# The same bytes spent otherwise: one mean in 8 bits, and 2 bits per task and weight.
run flexmerge merge "$work/plan.json" --method low_bit:bits=2,gain=norm,centre_bits=8,scales=bfloat16,clip=search \
  --size 2.25x -o "$work/residuals" --force
run flexmerge eval "$work/residuals" --spec samples/digits/eval.yaml
