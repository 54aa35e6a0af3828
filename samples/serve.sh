#!/usr/bin/env bash
# Eight fine-tuned models in the bytes of one, served from one process, and asked with curl.
# Makes a virtual environment (build/serve/venv, or $FLEXMERGE_VENV) and writes below build/serve.
set -euo pipefail
cd "$(dirname "$0")/.."
work=build/serve
venv=${FLEXMERGE_VENV:-$work/venv}
mkdir -p "$work"
. samples/environment.sh serve
run flexmerge plan --base samples/digits/base --tasks samples/digits/tasks -o "$work/plan.json" --force
run flexmerge merge "$work/plan.json" --method auto --size 1x -o "$work/bundle" --force
# In the background, on a port that is free. It says where once it answers.
printf '\n$ %s\n' "flexmerge serve $work/bundle --weights packed --port 0 &"
: >"$work/said"
flexmerge serve "$work/bundle" --weights packed --port 0 >"$work/said" &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
until grep -q http "$work/said"; do
  kill -0 "$server"
  sleep 0.2
done
cat "$work/said"
url=$(grep -o 'http://.*' "$work/said")
# Three digits of 8 × 8 pixels, ink from 0 to 16. The same pictures for two tasks: which digit, and odd or even.
"$venv/bin/python" - "$work/digits.json" <<'PYTHON'
import json, sys, numpy
with open(sys.argv[1], "w") as file:
    json.dump({"inputs": numpy.load("samples/digits/test/digit.npz")["images"][:3].tolist()}, file)
PYTHON
for task in digit parity; do
  run curl --silent --fail-with-body "$url/v1/tasks/$task/predict" -H 'Content-Type: application/json' -d "@$work/digits.json"
  echo
done
run curl --silent "$url/v1/models/parity"
echo
run curl --silent "$url/v1/tasks/nobody/predict" -H 'Content-Type: application/json' -d "@$work/digits.json"
echo
printf '\n$ %s\n' "curl --silent $url/metrics | grep flexmerge_inputs_total"
curl --silent "$url/metrics" | grep flexmerge_inputs_total
kill -TERM "$server"
wait "$server"
