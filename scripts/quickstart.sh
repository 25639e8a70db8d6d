#!/usr/bin/env bash
# One command from a fresh clone to the report in runs/quickstart/: CCA on two small models, on a CPU.
#   bash scripts/quickstart.sh [--control] [--seed N] [--seeds N] [--samples N] [--output DIR] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
unset DATA REFERENCE OUTPUT NPROC NNODES RDZV_ENDPOINT  # which are for the paper's experiments
exec "$python" -m scripts.reproduce quickstart "$@"
