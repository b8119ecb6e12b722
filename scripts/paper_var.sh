#!/usr/bin/env bash
# VAR: train the published sizes on ids of its multi-scale tokenizer, sample with its settings, FID and IS.
#   IMAGENET_PATH=DIR GPUS=8 MODELS=var_d16 bash scripts/paper_var.sh
#       from scratch, some of var_d16, var_d20, var_d24, var_d30, var_d36_s (default: var_d16,var_d20,var_d24,var_d30)
#   WEIGHTS=pretrained_models MODELS=var_d16,var_d36_s IMAGENET_PATH=DIR bash scripts/paper_var.sh
#       the published files, which scripts/download_weights.py puts there
#   PRESET=digits bash scripts/paper_var.sh
#       var_tiny on digits, on ids of a tokenizer of its own that is trained first
# The ids are those of VAR_VQ (pretrained_models/vae_ch160v4096z32.pth), also of the 512 pixels of var_d36_s. paper_env.sh
# has the other variables. Further arguments go to sample.py.
#
#   published   pixels   parameters   FID: README, paper   IS      precision   recall
#   d16         256      310 M        3.55   3.30          274.4   0.84        0.51
#   d20         256      600 M        2.95   2.57          302.6   0.83        0.56
#   d24         256      1.0 B        2.33   2.09          312.9   0.82        0.59
#   d30         256      2.0 B        1.97   1.92          323.1   0.82        0.59
#   d36-s       512      2.3 B        2.63   2.63          303.2
# IS, precision and recall are the paper's. The published guidance 1.5 is --cfg 2.5 (1 + 1.5 at the last scale), with
# top-k 900 and top-p 0.96. FID by other programs than ADM's differs: users of the published files report 3.49 for d16.
source "$(dirname "${BASH_SOURCE[0]}")/paper_env.sh"

vq=${VAR_VQ:-pretrained_models/vae_ch160v4096z32.pth}

# The name of a model's published file.
file_of() {
    case $1 in
        var_d16 | var_d20 | var_d24 | var_d30) echo "$1.pth" ;;
        var_d36_s) echo var_d36.pth ;;
        *) fail "unknown model '$1'; valid: var_d16, var_d20, var_d24, var_d30, var_d36_s" ;;
    esac
}

# Images of a training step, of all GPUs together.
batch_of() {
    if [ "$1" = var_d30 ]; then echo 1024; else echo 768; fi
}

if [ "$preset" = digits ]; then
    run python scripts/train_tokenizer.py --data digits --multiscale --stride 1 --width 16 --latent_channels 8 \
        --codebook_size 64 --batch_size 64 --lr 3e-3 --epochs 12 --output_dir "$out/tokenizer" \
        --resume
    weights=$out/weights/var_digits
    results=("$out/var_digits/results.jsonl")
    run python main_mar.py --preset var_digits --vae_path "$out/tokenizer/tokenizer.pth" --epochs "$epochs" \
        --output_dir "$weights" --resume "$weights"
    run python sample.py --checkpoint "$weights" --output_dir "$out/var_digits" --cfg 1,2,3 --seed "$seeds" \
        --num_images "$num_images" "$@"
else
    names=${MODELS:-var_d16,var_d20,var_d24,var_d30}
    for model in ${names//,/ }; do
        file_of "$model" >/dev/null # fails for an unknown name, before days of training
        [ -n "${WEIGHTS:-}" ] || share_batch "$(batch_of "$model")" 1024 # and for a number of GPUs
    done
    results=()
    for model in ${names//,/ }; do
        run=$out/$model weights=$out/weights/$model size=()
        results+=("$run/results.jsonl")
        if [ -n "${WEIGHTS:-}" ]; then
            weights=$WEIGHTS/$(file_of "$model") size=(--model "$model")
        else
            share_batch "$(batch_of "$model")" "$(($(batch_of "$model") / 8))" # as one of 8 GPUs has
            run torchrun --nproc_per_node="$gpus" main_mar.py --preset "$model" --data_path "$data" --vae_path "$vq" \
                --batch_size "$batch" --accum_iter "$accum" --output_dir "$weights" --resume "$weights"
        fi
        run torchrun --nproc_per_node="$gpus" sample.py --checkpoint "$weights" --vae_path "$vq" --output_dir "$run" \
            --data_path "$data" --cfg 1,2.5 --top_k 900 --top_p 0.96 --eval_bsz 64 --seed "$seeds" \
            --num_images "$num_images" "${size[@]}" "$@"
    done
fi
finish "${results[@]}" --metrics fid,is_mean --x cfg
