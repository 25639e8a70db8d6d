#!/usr/bin/env bash
# Figures 7 and 8: one class from the same random numbers: base, CCA, guided.
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec "$python" -m scripts.reproduce samples "$@"
