#!/usr/bin/env bash
# Set up; train mar_tiny on scikit-learn's digits, then four heads on the frozen model; compare the four inference
# modes, draw traces of images; sample 1,800 digits and measure them. Finished parts are not run again.
#   bash scripts/quickstart.sh [--output_dir DIR] [--epochs N] [--seed S,… of the comparison] [--dry_run] [other flags]
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

out=output_dir/quickstart
epochs=()
training=()
sampling=()
images=(--num_images 300)
seeds=(--seed 0,1,2)
words=()
for word in "$@"; do # --flag=value is --flag value
    case $word in
        --*=*) words+=("${word%%=*}" "${word#*=}") ;;
        *) words+=("$word") ;;
    esac
done
for ((i = 0; i < ${#words[@]}; i++)); do
    case ${words[i]} in
        --output_dir) out=${words[i + 1]} && i=$((i + 1)) ;;
        --epochs) epochs=(--epochs "${words[i + 1]}") && i=$((i + 1)) ;;
        --order | --group | --schedule | --*_schedule | --cfg | --cfg_power | --cfg_*interval | --cfg_profile | \
            --temperature* | --num_iter | --num_sampling_steps | --solver | --eval_bsz | --metrics | --features | --device | --dtype)
            sampling+=("${words[i]}" "${words[i + 1]}")
            training+=("${words[i]}" "${words[i + 1]}") && i=$((i + 1))
            ;;
        --seed) seeds=(--seed "${words[i + 1]}") && i=$((i + 1)) ;;
        --num_images) images=(--num_images "${words[i + 1]}") && sampling+=("${images[@]}") && i=$((i + 1)) ;;
        *) training+=("${words[i]}") ;;
    esac
done

run python main_mar.py --preset digits "${training[@]}" "${epochs[@]}" --output_dir "$out" --resume "$out"

# The heads, on masks of every ratio: the states that sampling meets.
run python main_mar.py --preset digits "${training[@]}" --init_from "$out" --freeze_backbone --no-train_diffloss \
    --learn order,group,tau,cfg --mask_ratio_min 0 --mask_ratio_per_image --epochs 6 --warmup_epochs 0 "${epochs[@]}" \
    --output_dir "$out/heads" --resume "$out/heads"

modes=$out/modes
run python sample.py --checkpoint "$out/heads" --output_dir "$modes" "${sampling[@]}" "${images[@]}" --save_trace 1 \
    --infer_mode baseline,policy,guidance,both "${seeds[@]}"
first=${seeds[1]%%,*}
trace=("$modes"/both_*_seed"$first"_*/trace.npz)
run python scripts/plot_trace.py "${trace[0]}" --out "$out/trace"
say
run python scripts/make_table.py "$modes/results.jsonl" --csv "$modes/table.csv"
say

run python sample.py --checkpoint "$out" --output_dir "$out/samples" "${sampling[@]}"
