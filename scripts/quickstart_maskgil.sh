#!/usr/bin/env bash
# Set up; train a VQ tokenizer on scikit-learn's digits, then maskgil_tiny on its ids; sample 1,800 digits in 8 steps and
# measure them. Finished parts are not run again.
#   bash scripts/quickstart_maskgil.sh [--output_dir DIR] [--epochs N] [--dry_run] [other flags]
# Flags of sampling and measuring go to sample.py, all others to main_mar.py. TOKENIZER_EPOCHS: of the tokenizer (20).
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

out=output_dir/quickstart_maskgil
training=()
sampling=()
checked=() # of the flags of sampling those with one value, which main_mar.py knows too
traces=()
split "$@"
for ((i = 0; i < ${#words[@]}; i++)); do
    case ${words[i]} in
        --output_dir) out=${words[i + 1]-} && i=$((i + 1)) ;;
        --order | --group | --group_[ap] | --cfg | --cfg_schedule | --cfg_power | --cfg_interval | --confidence_* | \
            --tau_schedule | --temperature | --temperature_end | --num_iter | --num_images | --eval_bsz | --metrics | \
            --features | --seed)
            sampling+=("${words[i]}" "${words[i + 1]-}")
            [[ ${words[i]} != --cfg_interval && ${words[i + 1]-} == *,* ]] || checked+=("${words[i]}" "${words[i + 1]-}")
            i=$((i + 1))
            ;;
        --save_trace) traces=(--save_trace "${words[i + 1]-}") && i=$((i + 1)) ;;
        --device | --dtype)
            sampling+=("${words[i]}" "${words[i + 1]-}")
            training+=("${words[i]}" "${words[i + 1]-}") && i=$((i + 1))
            ;;
        *) training+=("${words[i]}") ;;
    esac
done
[ "$i" -le "${#words[@]}" ] || fail "${words[-1]} needs a value"

vq=$out/tokenizer
model=(python main_mar.py --preset digits --model maskgil_tiny --tokenizer "diffusers:$vq/autoencoder" --loss_tokens masked
    --label_smoothing 0 --epochs 40 --eval_freq 1000 "${training[@]}" --output_dir "$out")
check "${model[@]}" "${checked[@]}"
run python scripts/train_tokenizer.py --data digits --vq --stride 2 --codebook_size 256 --latent_channels 4 \
    --epochs "${TOKENIZER_EPOCHS:-20}" --output_dir "$vq" --resume
run "${model[@]}" --resume "$out"
run python sample.py --checkpoint "$out" --output_dir "$out/samples" --num_iter 8 --cfg 2 "${sampling[@]}" "${traces[@]}"
