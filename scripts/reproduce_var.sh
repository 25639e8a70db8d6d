#!/usr/bin/env bash
# VAR rows of the paper's tables and figure 1: base without guidance, with it, published CCA, CCA trained here.
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec "$python" -m scripts.reproduce var-tables "$@"
