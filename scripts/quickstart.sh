#!/usr/bin/env bash
# One command from a fresh clone to the report in runs/quickstart/. Options go to scripts/quickstart.py:
#   bash scripts/quickstart.sh [--control] [--seed N] [--samples N] [--output DIR] [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
# What is wrong with the options is said once and in one line, before torchrun, which adds forty.
case " $* " in *" --help "* | *" -h "*) exec .venv/bin/python -m scripts.quickstart --help ;; esac
.venv/bin/python -m scripts.quickstart "$@" --dry-run >/dev/null
cores=$(getconf _NPROCESSORS_ONLN)
processes=$(.venv/bin/python -c "import torch; print(torch.cuda.device_count() or min($cores, 4))")
export OMP_NUM_THREADS=$((cores / processes > 0 ? cores / processes : 1))
exec .venv/bin/torchrun --standalone --nproc_per_node "$processes" -m scripts.quickstart "$@"
