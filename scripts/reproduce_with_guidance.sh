#!/usr/bin/env bash
# Reproduces figure 6: CCA with guidance on top, trained by its own recipe, compared with guidance alone.
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec "$python" -m scripts.reproduce with-guidance "$@"
