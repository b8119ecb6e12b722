#!/usr/bin/env bash
# On a machine with CUDA: the tests that need it, then the default tests with devices as users have them (--device auto).
# Arguments go to pytest: bash scripts/test_gpu.sh -k sampling
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
run python -m pytest -m gpu "$@"
run python -m pytest -m "not slow and not gpu" "$@"
