#!/usr/bin/env bash
# Tokenizers, each with MAR-L trained on it for 400 epochs: rFID, PSNR and SSIM of their reconstructions, FID and IS of
# the generated images. A token is 16x16 pixels throughout.
#   IMAGENET_PATH=DIR GPUS=8 VQ16_SCALE=S bash scripts/paper_tokenizers.sh
#       kl16, vq16, kl8 and consistency
#   PRESET=digits bash scripts/paper_tokenizers.sh
#       digits have no autoencoder: pixels as tokens of 1x1, 2x2, 4x4
# kl16: MAR's; vq16: LDM's in VAE_DIR/vq16.ckpt (pretrained_models/vae), before quantisation, its scale S as
# scripts/measure_latents.py reports it; kl8, consistency: Stable Diffusion's encoder, with its own decoder or with
# OpenAI's consistency decoder, from the hub. TOKENIZERS=kl16,kl8: some of them.
# paper_env.sh has the other variables. Further arguments go to main_mar.py, such as --use_cached --cached_path DIR.
source "$(dirname "${BASH_SOURCE[0]}")/paper_env.sh"

vae=${VAE_DIR:-pretrained_models/vae}
tokenizers=${TOKENIZERS:-kl16,vq16,kl8,consistency}
if [ "$preset" = digits ]; then
    tokenizers=pixel_1,pixel_2,pixel_4
fi
for name in ${tokenizers//,/ }; do
    case $name in
        pixel_[124] | kl16 | kl8 | consistency) ;;
        vq16)
            [ -z "$dry_run" ] || VQ16_SCALE=${VQ16_SCALE:-VQ16_SCALE} # a word to replace
            [ -n "${VQ16_SCALE:-}" ] || fail "vq16 needs VQ16_SCALE, see scripts/measure_latents.py"
            ;;
        *) fail "unknown tokenizer '$name' in TOKENIZERS; valid: kl16, vq16, kl8, consistency" ;;
    esac
done
[ "$preset" = digits ] || share_batch 2048 64
results=()
for name in ${tokenizers//,/ }; do
    run=$out/$name
    results+=("$run/results.jsonl")
    case $name in
        pixel_*) tokenizer=(--patch_size "${name#pixel_}") ;;
        kl16) tokenizer=(--tokenizer kl16 --vae_path "$vae/kl16.ckpt") ;;
        vq16) tokenizer=(--tokenizer vq16 --vae_path "$vae/vq16.ckpt") ;;
        kl8) tokenizer=(--tokenizer diffusers:stabilityai/sd-vae-ft-mse) ;;
        consistency) tokenizer=(--tokenizer diffusers:openai/consistency-decoder) ;;
    esac
    training=("${tokenizer[@]}")
    case $name in
        vq16) training+=(--vae_scale "$VQ16_SCALE") ;;
        kl8 | consistency) training+=(--patch_size 2) ;; # of stride 8
    esac
    if [ "$preset" = imagenet ]; then
        run python scripts/measure_reconstruction.py "${tokenizer[@]}" --data imagefolder --data_path "$data" \
            --img_size 256 --split val --output_dir "$out/reconstruction"
    fi
    for seed in ${seeds//,/ }; do
        weights=$out/weights/${name}_seed_$seed
        if [ "$preset" = digits ]; then
            run python main_mar.py --preset digits "${training[@]}" --epochs "$epochs" --seed "$seed" \
                --output_dir "$weights" --resume "$weights" "$@"
            run python sample.py --checkpoint "$weights" --output_dir "$run" --cfg 1,1.5 --seed "$seed" \
                --num_images "$num_images"
        else
            run torchrun --nproc_per_node="$gpus" main_mar.py --preset mar_large "${training[@]}" --epochs 400 \
                --data_path "$data" --batch_size "$batch" --accum_iter "$accum" --seed "$seed" \
                --output_dir "$weights" --resume "$weights" "$@"
            run torchrun --nproc_per_node="$gpus" sample.py --checkpoint "$weights" --output_dir "$run" \
                --data_path "$data" --cfg 1,3.0 --num_iter 256 --num_sampling_steps 100 --eval_bsz 256 \
                --seed "$seed" --num_images "$num_images"
        fi
    done
done
if [ "$preset" = imagenet ]; then
    into "$out/reconstruction.md" python scripts/make_table.py "$out/reconstruction/results.jsonl"
    say
fi
finish "${results[@]}" --metrics fid,is_mean --x run
