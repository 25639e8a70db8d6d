#!/usr/bin/env bash
# Figures 4 and 9: FID over inception score, CCA over lambda and beta against guidance over its scale.
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec "$python" -m scripts.reproduce tradeoff "$@"
