#!/usr/bin/env bash
# Set up, train mar_tiny on scikit-learn's digits, sample 1,800 of them and measure them. Made once, then reused.
# Flags go to main_mar.py, those about sampling to sample.py too: bash scripts/quickstart.sh --epochs 1 --num_iter 4
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

out=output_dir/quickstart
sampling=()
words=()
for word in "$@"; do # --flag=value is --flag value
    case $word in
        --*=*) words+=("${word%%=*}" "${word#*=}") ;;
        *) words+=("$word") ;;
    esac
done
for ((i = 0; i < ${#words[@]}; i++)); do
    case ${words[i]} in
        --output_dir) out=${words[i + 1]} ;;
        --infer_mode | --order | --group | --*_schedule | --cfg | --cfg_* | --temperature* | --num_iter | \
            --num_sampling_steps | --solver | --num_images | --eval_bsz | --metrics | --features | --device | --dtype)
            sampling+=("${words[i]}" "${words[i + 1]}")
            ;;
    esac
done

python main_mar.py --preset digits --output_dir "$out" --resume "$out" "${words[@]}"
python sample.py --checkpoint "$out" --output_dir "$out/samples" "${sampling[@]}"
