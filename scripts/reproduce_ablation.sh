#!/usr/bin/env bash
# Table 3: base, DPO, unlearning, CCA and plain maximum likelihood, guidance-free.
#   bash scripts/reproduce_ablation.sh --help
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec .venv/bin/python -m scripts.reproduce ablation "$@"
