#!/usr/bin/env bash
# plan → merge → gate → push: publishes the bundle of a recipe, if its gate passes. `publish.sh RECIPE hf://org/name`
# A recipe without a gate is refused. Writes plan.json and bundle/ into $WORK, `build` unless it is given.
# $PUSH_OPTIONS are further options of `flexmerge push`, such as --private. The token is $HF_TOKEN's.
set -euo pipefail
recipe=${1:?usage: publish.sh RECIPE hf://org/name}
target=${2:?usage: publish.sh RECIPE hf://org/name}
work=${WORK:-build}
mkdir -p "$work"
grep -q '^gate:' "$recipe" || { echo "$recipe has no gate: nothing would be checked" >&2; exit 2; }
run() { printf '\n$ %s\n' "$*"; "$@"; }
run flexmerge plan "$recipe" -o "$work/plan.json" --force
# The gate scores the finished bundle; what does not pass ends the script here, with exit code 6. The card has the scores.
run flexmerge merge "$recipe" --plan "$work/plan.json" -o "$work/bundle" --force
# Every byte is compared with the manifest before anything is sent.
# shellcheck disable=SC2086  # these may be several options
run flexmerge push "$work/bundle" "$target" ${PUSH_OPTIONS:-}
