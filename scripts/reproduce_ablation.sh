#!/usr/bin/env bash
# Table 3: base, DPO, unlearning, CCA and plain maximum likelihood, guidance-free.
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec "$python" -m scripts.reproduce ablation "$@"
