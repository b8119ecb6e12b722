#!/usr/bin/env bash
# Set up, lint, and run the default tests. Arguments go to pytest: bash scripts/test.sh -k ragged
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
ruff check .
ruff format --check .
exec python -m pytest "$@"
