#!/usr/bin/env bash
# Figure 6: CCA with guidance on top, by its own recipe, against guidance alone.
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"
exec "$python" -m scripts.reproduce with-guidance "$@"
