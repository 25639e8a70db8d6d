#!/usr/bin/env bash
# Sets up the environment, checks the code (ruff, mypy) and runs the tests. Options go to pytest: -m slow runs the
# long tests.
requirements=requirements-dev.txt
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
"$python" -m ruff check --quiet .
"$python" -m ruff format --check --quiet . || { echo "error: run ruff format" >&2; exit 1; }
"$python" -m mypy --no-error-summary
# Two tests at a time, with one thread each.
OMP_NUM_THREADS=1 exec "$python" -m pytest -n 2 --dist worksteal "$@"
