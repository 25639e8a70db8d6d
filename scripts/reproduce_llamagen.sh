#!/usr/bin/env bash
# Reproduces the LlamaGen rows of the paper's tables and figure 1: base without and with guidance, published CCA,
# and CCA trained here.
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec "$python" -m scripts.reproduce llamagen-tables "$@"
