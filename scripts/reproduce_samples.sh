#!/usr/bin/env bash
# Reproduces figures 7 and 8: one class sampled from base, CCA and guided base with the same random numbers.
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec "$python" -m scripts.reproduce samples "$@"
