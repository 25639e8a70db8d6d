# Sourced by the other scripts: a virtual environment in the checkout that matches the requirements.
# A script that needs more than users do names its file: requirements=requirements-dev.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=${requirements:-requirements.txt}
stamp=.venv/${requirements%.txt}.sha256
if ! { [ -f "$stamp" ] && sha256sum --status -c "$stamp"; } 2>/dev/null; then
    python=.venv/bin/python
    [ -x $python ] || python=python3
    $python -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: Python 3.11 or newer is needed; $python is $($python --version)" >&2; exit 2; }
    echo "setting up .venv (the first time this downloads PyTorch: a few minutes, about 6 GB)"
    [ $python = .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    sha256sum requirements.txt "$requirements" >"$stamp"
fi
