#!/usr/bin/env bash
# Set up .venv and run the tests; arguments go to pytest: ./scripts/test.sh -m slow
set -euo pipefail
. "$(dirname "$0")/setup.sh"
python scripts/quickstart_model.py >/dev/null # the real model that some tests use; kept in the user's cache folder

ruff check .
ruff format --check .
mypy
exec python -m pytest -m "${QLORA_TESTS:-not slow and not gpu}" "$@"
