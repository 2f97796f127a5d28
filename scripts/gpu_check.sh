#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: scripts/gpu_check.py says what, and its options.
#
#   ./scripts/gpu_check.sh [--minutes 25] [--emulate-gib 23.5]
#   PYTHON=python3 ./scripts/gpu_check.sh     with this Python and the libraries that it has, instead of .venv
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${PYTHON:-}" ]; then
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    exec "$PYTHON" scripts/gpu_check.py "$@"
fi
. scripts/setup.sh
exec python scripts/gpu_check.py "$@"
