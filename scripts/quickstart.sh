#!/usr/bin/env bash
# Set up, train mar_tiny on scikit-learn's digits, sample 1,800 of them and measure them. Made once, then reused.
# Arguments go to main_mar.py: bash scripts/quickstart.sh --epochs 1 --output_dir output_dir/try
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

out=output_dir/quickstart
sampling=()
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case ${!i} in
        --output_dir) out=${!next} ;;
        --num_images | --num_iter | --num_sampling_steps | --metrics | --cfg | --device) sampling+=("${!i}" "${!next}") ;;
    esac
done

python main_mar.py --preset digits --output_dir "$out" --resume "$out" "$@"
python sample.py --checkpoint "$out" --output_dir "$out/samples" "${sampling[@]}"
