# The other scripts source this file. With --help it prints the help and exits. Otherwise it sets $python to a Python
# that has the requirements. A script with other requirements sets requirements=FILE before.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
script=scripts/$(basename "$0")
requirements=${requirements:-requirements.txt}

# The help is the comment at the top of the script, then the docstring of scripts/reproduce.py.
case " $* " in *" --help "* | *" -h "*)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
    ! grep -q scripts.reproduce "$script" || { echo && sed '1s/^"""//; /^"""$/,$d' scripts/reproduce.py; }
    exit
esac

# has PYTHON FILE: succeeds if PYTHON has the packages in the requirements FILE. Imports none of them.
has() {
    "$1" - "$2" 2>/dev/null <<'EOF'
import re, sys
from importlib.metadata import version

def numbers(text):
    return [int(part) for part in re.match(r"\d+(\.\d+)*", text)[0].split(".")]

def check(file):
    for line in open(file):
        name, _, least = line.partition("#")[0].strip().partition(">=")
        if name.startswith("-r "):
            check(name[3:])
        elif name and numbers(version(name)) < numbers(least or "0"):
            sys.exit(1)

if sys.version_info < (3, 11):
    sys.exit(1)
check(sys.argv[1])
EOF
}

# Use the active environment if it has all packages, else .venv, in which missing packages are installed.
for python in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} python3 .venv/bin/python ""; do
    ! has "$python" "$requirements" || break
done
if [ -z "$python" ]; then
    python=.venv/bin/python
    [ -x $python ] || python=python3
    $python -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "error: Python 3.11 or newer is needed; $python is $($python --version)" >&2; exit 2; }
    echo "the active environment lacks some of $requirements: installing it into $PWD/.venv (PyTorch and its dependencies are about 6 GB; this takes a few minutes)"
    [ $python = .venv/bin/python ] || python3 -m venv .venv
    python=.venv/bin/python
    $python -m pip install --quiet --disable-pip-version-check -r "$requirements"
fi
