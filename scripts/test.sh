#!/usr/bin/env bash
# Set up .venv and run the tests; arguments go to pytest: ./scripts/test.sh -m slow
set -euo pipefail
. "$(dirname "$0")/setup.sh"
python scripts/quickstart_model.py >/dev/null & # the real model that some tests use; kept in the user's cache folder
model=$!
trap 'kill $model 2>/dev/null || true' EXIT

ruff check .
ruff format --check .
mypy
wait $model
tests=${QLORA_TESTS:-not slow and not gpu}
# tests side by side, one thread each: tiny models have no work for two. One GPU takes one test at a time.
cores=$(getconf _NPROCESSORS_ONLN)
workers=$((cores < 4 ? cores : 4))
[ "$tests" = gpu ] && workers=0 || export OMP_NUM_THREADS=1
# what a test runs in a process of its own need not be compiled each time
python -m compileall -q qlora tests
exec python -m pytest -m "$tests" -n "$workers" --dist worksteal "$@"
