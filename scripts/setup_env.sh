# Sourced by the other scripts: a Python environment with the requirements. It is the active virtual environment, else
# .venv in the repository, which is made if missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -f .venv/bin/activate ]; then
        python=${PYTHON:-python3}
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: Python 3.11 or newer is needed, $("$python" --version 2>&1) found; set PYTHON to one" >&2
            exit 2
        }
        echo "making .venv"
        "$python" -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

# Install if requirements.txt is not the one of the last installation in this environment.
stamp="$VIRTUAL_ENV/.mar_requirements"
if ! cmp -s requirements.txt "$stamp"; then
    echo "installing requirements.txt (once; a few minutes)"
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$stamp"
fi
