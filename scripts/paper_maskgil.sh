#!/usr/bin/env bash
# MaskGIL-B, -L, -XL and -XXL: train for 300 epochs on ids of LlamaGen's VQ-16, sample in 8 steps, FID and IS.
#   IMAGENET_PATH=DIR GPUS=8 MODELS=maskgil_b bash scripts/paper_maskgil.sh
#       one of them (default: all four); its tokenizer is in VAE_DIR/vq_ds16_c2i.pt (pretrained_models), where
#       scripts/download_weights.py llamagen_vq16 puts it. No weights of MaskGIL are published.
#   PRESET=digits bash scripts/paper_maskgil.sh
#       maskgil_tiny on digits, with a VQ tokenizer of one's own, trained first
# Published (README of the code, October 2024): FID 5.64, 4.01, 3.90, 3.71 at 256 pixels. What is known of them: the
# paper says 8 steps; the code has 8, 12 and 32 steps, guidance 4 and 5 (in this project's scale) and noise 4.5 and 7
# in different places, and says not which were used. Images were stretched to their own minimum and maximum before
# measuring, real ones too, so that its FIDs are not comparable with those here. The published code is not the paper's
# model (no QK-norm, no post-norm, one-dimensional positions); VARIANT=code trains it, VARIANT=paper (default) the
# paper's. Learning rate, decay, batch and masks are the code's; its 16 bits were fp16 without an average of weights.
# CFGS and NOISES: comma lists to choose from, all of which are measured.
# paper_env.sh has the other variables. Further arguments go to sample.py.
source "$(dirname "${BASH_SOURCE[0]}")/paper_env.sh"

cfgs=${CFGS:-1,3,4,5} noises=${NOISES:-4.5}
case ${VARIANT:-paper} in
    paper) variant=() ;;
    code) variant=(--rope published --no_qk_norm --no_post_norm) ;;
    *) fail "unknown VARIANT '$VARIANT'; valid: paper, code" ;;
esac
results=()
if [ "$preset" = digits ]; then
    vq=$out/tokenizer weights=${WEIGHTS:-$out/weights}/maskgil_tiny
    results+=("$out/maskgil_tiny/results.jsonl")
    run python scripts/train_tokenizer.py --data digits --vq --stride 2 --codebook_size 256 --latent_channels 4 \
        --epochs 150 --output_dir "$vq" --resume
    run python main_mar.py --preset digits --model maskgil_tiny --tokenizer "diffusers:$vq/autoencoder" \
        "${variant[@]}" --epochs "$epochs" --output_dir "$weights" --resume "$weights"
    run python sample.py --checkpoint "$weights" --output_dir "$out/maskgil_tiny" --cfg "$cfgs" --num_iter 8 \
        --infer_mode maskgil --confidence_noise "$noises" --seed "$seeds" --num_images "$num_images" "$@"
else
    models=${MODELS:-maskgil_b,maskgil_l,maskgil_xl,maskgil_xxl}
    for model in ${models//,/ }; do
        case $model in
            maskgil_b | maskgil_l | maskgil_xl | maskgil_xxl) ;;
            *) fail "unknown model '$model'; valid: maskgil_b, maskgil_l, maskgil_xl, maskgil_xxl" ;;
        esac
    done
    share_batch 256 256
    tokenizer=(--tokenizer llamagen_vq16 --vae_path "${VAE_DIR:-pretrained_models}/vq_ds16_c2i.pt")
    for model in ${models//,/ }; do
        run=$out/$model weights=${WEIGHTS:-$out/weights}/$model
        results+=("$run/results.jsonl")
        run torchrun --nproc_per_node="$gpus" main_mar.py --data imagefolder --data_path "$data" --model "$model" \
            "${tokenizer[@]}" "${variant[@]}" --epochs 300 --batch_size "$batch" --lr 1e-4 --warmup_epochs 0 \
            --weight_decay 1e-5 --beta2 0.96 --grad_clip 1 --output_dir "$weights" --resume "$weights"
        run torchrun --nproc_per_node="$gpus" sample.py --checkpoint "$weights" --output_dir "$run" \
            --data_path "$data" --cfg "$cfgs" --num_iter 8 --infer_mode maskgil --confidence_noise "$noises" \
            --eval_bsz 256 --seed "$seeds" --num_images "$num_images" "$@"
    done
fi
finish "${results[@]}" --metrics fid,is_mean --x cfg
