#!/usr/bin/env bash
# LlamaGen's causal models of classes: train for 300 epochs on ids of its VQ-16, sample with its settings, FID and IS.
#   IMAGENET_PATH=DIR GPUS=8 MODELS=llamagen_ar_b bash scripts/paper_llamagen.sh
#       from scratch at 256 pixels, some of llamagen_ar_b, _l, _xl, _xxl (default: llamagen_ar_b,llamagen_ar_l)
#   WEIGHTS=pretrained_models MODELS=llamagen_ar_b,llamagen_ar_l_384 IMAGENET_PATH=DIR bash scripts/paper_llamagen.sh
#       the published files, which scripts/download_weights.py puts there; _384: of 384 pixels
#   PRESET=digits bash scripts/paper_llamagen.sh
#       causal_gpt_tiny on digits, on ids of a tokenizer of its own that is trained first
# The ids are those of VQ16 (pretrained_models/vq_ds16_c2i.pt). paper_env.sh has the other variables. Further arguments
# go to sample.py.
#
#   published     tokens   cfg    FID
#   B             16x16    2.0    5.46
#   L             16x16    2.0    3.80
#   L             24x24    2.0    3.07
#   XL            24x24    1.75   2.62
#   XXL           24x24    1.75   2.34
# Images of 24x24 tokens have 384 pixels and were resized to 256 to be measured; this script measures them at 384. Users
# of the published files report worse figures than these: B 6.13, L 6.23 and 6.84, XL 3.68.
source "$(dirname "${BASH_SOURCE[0]}")/paper_env.sh"

vq=${VQ16:-pretrained_models/vq_ds16_c2i.pt}

# The guidance scale of a published model, the same for all tokens.
llamagen_cfg_of() {
    case $1 in
        llamagen_ar_b | llamagen_ar_l | llamagen_ar_b_384 | llamagen_ar_l_384) echo 2.0 ;;
        llamagen_ar_xl | llamagen_ar_xxl | llamagen_ar_xl_384 | llamagen_ar_xxl_384) echo 1.75 ;;
        *) fail "unknown model '$1'; valid: llamagen_ar_b, llamagen_ar_l, llamagen_ar_xl, llamagen_ar_xxl, each also with _384" ;;
    esac
}

# The name of a model's published file.
file_of() {
    local size=${1#llamagen_ar_} side=256
    [[ $size != *_384 ]] || side=384
    size=${size%_384}
    echo "c2i_${size^^}_$side.pt"
}

if [ "$preset" = digits ]; then
    run python scripts/train_tokenizer.py --data digits --vq --codebook_size 256 --stride 2 --latent_channels 4 \
        --epochs 150 --output_dir "$out/tokenizer"
    weights=$out/weights/causal_gpt_tiny
    results=("$out/causal_gpt_tiny/results.jsonl")
    run python main_mar.py --preset digits --model causal_gpt_tiny --tokenizer "diffusers:$out/tokenizer/autoencoder" \
        --epochs "$epochs" --output_dir "$weights" --resume "$weights"
    run python sample.py --checkpoint "$weights" --output_dir "$out/causal_gpt_tiny" --cfg 1,1.5,2 \
        --cfg_schedule constant --seed "$seeds" --num_images "$num_images" "$@"
else
    names=${MODELS:-llamagen_ar_b,llamagen_ar_l}
    for name in ${names//,/ }; do
        llamagen_cfg_of "$name" >/dev/null # fails for an unknown name, before hours of training
    done
    results=()
    for name in ${names//,/ }; do
        run=$out/$name model=${name%_384} cfg=$(llamagen_cfg_of "$name") side=256 weights=$out/weights/$name raw=()
        [[ $name != *_384 ]] || side=384
        results+=("$run/results.jsonl")
        if [ -n "${WEIGHTS:-}" ]; then
            weights=$WEIGHTS/$(file_of "$name") raw=(--no_ema)
        else
            share_batch 256 256
            run torchrun --nproc_per_node="$gpus" main_mar.py --data_path "$data" --img_size "$side" --model "$model" \
                --tokenizer llamagen_vq16 --vae_path "$vq" --epochs 300 --warmup_epochs 0 --lr 1e-4 \
                --weight_decay 0.05 --grad_clip 1 --batch_size "$batch" --output_dir "$weights" --resume "$weights"
        fi
        run torchrun --nproc_per_node="$gpus" sample.py --checkpoint "$weights" --model "$model" --img_size "$side" \
            --vae_path "$vq" --output_dir "$run" --data_path "$data" --cfg "1,$cfg" --cfg_schedule constant \
            --eval_bsz 256 --seed "$seeds" --num_images "$num_images" "${raw[@]}" "$@"
    done
fi
finish "${results[@]}" --metrics fid,is_mean --x cfg
