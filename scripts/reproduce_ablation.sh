#!/usr/bin/env bash
# Reproduces table 3: base, DPO, unlearning, CCA and plain maximum likelihood, all without guidance.
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec "$python" -m scripts.reproduce ablation "$@"
