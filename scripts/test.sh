#!/usr/bin/env bash
# Set up, lint, and run the default tests. Arguments go to pytest: bash scripts/test.sh -k ragged
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
run ruff check .
run ruff format --check .
run python -m pytest "$@"
