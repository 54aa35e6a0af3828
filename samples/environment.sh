# Sourced by the scripts beside it, in the repository's root: makes a virtual environment in $venv with the extra $1,
# unless there is one, and puts it on PATH. A CPU build of torch where there is no GPU: 200 MB instead of gigabytes.
if [ ! -x "$venv/bin/flexmerge" ]; then
  python3 -m venv "$venv"
  if ! command -v nvidia-smi >/dev/null; then
    "$venv/bin/pip" install --quiet 'torch==2.13.0+cpu' 2>/dev/null ||
      "$venv/bin/pip" install --quiet torch --index-url https://download.pytorch.org/whl/cpu
  fi
  "$venv/bin/pip" install --quiet ".[$1]"
fi
PATH=$(cd "$(dirname "$venv/bin/flexmerge")" && pwd):$PATH
run() { printf '\n$ %s\n' "$*"; "$@"; }
