#!/usr/bin/env bash
# Reproduces figures 4 and 9: FID over inception score, for CCA over lambda and beta and for guidance over its scale.
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec "$python" -m scripts.reproduce tradeoff "$@"
