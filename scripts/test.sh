#!/usr/bin/env bash
# Sets up the environment and runs the tests; options go to pytest (-m slow runs the long ones).
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec .venv/bin/python -m pytest "$@"
