#!/usr/bin/env bash
# One MaskGIL for images of three shapes: canvases of a digit (8x8), of two side by side (8x16) and of two one above the
# other (16x8), trained together in batches of one shape, sampled in each, and how many are what was asked for: the
# digit of the class first and, of two, the next one after it.
#   bash scripts/demo_shapes.sh [--dry_run] [flags of sample.py]
# OUT: folder (output_dir/demo_shapes). EPOCHS, TOKENIZER_EPOCHS: of the model and of its VQ tokenizer, which has seen
# single digits only. Finished parts are not run again.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

out=${OUT:-output_dir/demo_shapes}
vq=$out/tokenizer
sizes=(8x8 8x16 16x8)
run python scripts/train_tokenizer.py --data digits --vq --stride 2 --codebook_size 256 --latent_channels 4 \
    --epochs "${TOKENIZER_EPOCHS:-20}" --output_dir "$vq" --resume
run python scripts/cache_latents.py --data canvases --buckets 8x8,8x16,16x8 --tokenizer "diffusers:$vq/autoencoder" \
    --tokens discrete --num_workers 0 --cached_path "$out/ids"
run python main_mar.py --data canvases --use_cached --cached_path "$out/ids" --model maskgil_tiny \
    --tokenizer "diffusers:$vq/autoencoder" --loss_tokens masked --label_smoothing 0 --batch_size 32 --blr 1.6e-2 \
    --epochs "${EPOCHS:-15}" --warmup_epochs 1 --eval_freq 1000 --output_dir "$out/model" --resume "$out/model"
for size in "${sizes[@]}"; do
    run python sample.py --checkpoint "$out/model" --output_dir "$out/samples_$size" --img_size "$size" --metrics none \
        --num_images 400 --eval_bsz 100 --num_iter 8 --cfg 2 "$@"
done
into "$out/table.md" python scripts/demo_shapes.py --output_dir "$out" --tokenizer "diffusers:$vq/autoencoder"
