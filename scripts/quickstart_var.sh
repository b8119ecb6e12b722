#!/usr/bin/env bash
# Set up; train a multi-scale tokenizer on scikit-learn's digits, then var_tiny on its ids; sample 1,800 digits and measure
# them. Finished parts are not run again.
#   bash scripts/quickstart_var.sh [--output_dir DIR] [--epochs N] [--dry_run] [other flags]
# --epochs is of both trainings. Settings of sampling go to sample.py too, --num_images also to main_mar.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

out=output_dir/quickstart_var
tokenizer=(--epochs 10)
training=()
sampling=()
split "$@"
for ((i = 0; i < ${#words[@]}; i++)); do
    case ${words[i]} in
        --output_dir) out=${words[i + 1]-} && i=$((i + 1)) ;;
        --epochs)
            tokenizer=(--epochs "${words[i + 1]-}")
            training+=(--epochs "${words[i + 1]-}")
            i=$((i + 1))
            ;;
        --cfg | --cfg_schedule | --cfg_power | --cfg_interval | --temperature* | --tau_schedule | --top_k | --top_p | \
            --infer_mode | --seed | --num_images | --eval_bsz | --metrics | --features | --device | --dtype)
            training+=("${words[i]}" "${words[i + 1]-}")
            sampling+=("${words[i]}" "${words[i + 1]-}")
            i=$((i + 1))
            ;;
        --smooth) sampling+=(--smooth) ;; # for pictures: heads do not learn with it, and traces do not show it
        --save_trace) sampling+=(--save_trace "${words[i + 1]-}") && i=$((i + 1)) ;;
        *) training+=("${words[i]}") ;;
    esac
done
[ "$i" -le "${#words[@]}" ] || fail "${words[-1]} needs a value"

model=(python main_mar.py --preset var_digits --eval_freq 1000 "${training[@]}" --output_dir "$out")
ids=$out/tokenizer/tokenizer.pth
[ -f "$ids" ] || check "${model[@]}"
[ -f "$ids" ] || run python scripts/train_tokenizer.py --data digits --multiscale --stride 1 --width 16 \
    --latent_channels 8 --codebook_size 64 --batch_size 64 --lr 3e-3 "${tokenizer[@]}" --features digits \
    --output_dir "$out/tokenizer" --resume

run "${model[@]}" --vae_path "$ids" --resume "$out"

run python sample.py --checkpoint "$out" --output_dir "$out/samples" "${sampling[@]}"
