#!/usr/bin/env bash
# Figures 5 and 6: CCA with guidance on top, by its own recipe, against guidance alone.
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec "$python" -m scripts.reproduce with-guidance "$@"
