#!/usr/bin/env bash
# Fine-tunes two small models with CCA on a CPU, and writes a report to runs/quickstart/. Needs only a fresh clone.
#   bash scripts/quickstart.sh [--control] [--seed N] [--seeds N] [--samples N] [--output DIR] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec "$python" -m scripts.reproduce quickstart "$@"
