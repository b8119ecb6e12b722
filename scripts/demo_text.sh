#!/usr/bin/env bash
# Does text decide what a MaskGIL draws? Digits with captions in twelve wordings, features of a tiny random T5 encoder (it
# has learned nothing, but tells words apart), maskgil_t2i_tiny; then prompts in four wordings that it has never seen, made
# of the same words, and the share of the samples that a classifier takes for the digit asked for.
#   bash scripts/demo_text.sh [--dry_run] [flags of sample.py]
# OUT: folder (output_dir/demo_text), another one for other flags. EPOCHS, TOKENIZER_EPOCHS: of the model and of its VQ
# tokenizer. Finished parts are not run again.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

out=${OUT:-output_dir/demo_text}
vq=$out/tokenizer
run python scripts/demo_text.py --output_dir "$out"
run python scripts/cache_text.py --data digits --captions "$out/captions.csv" --text_encoder "$out/encoder" \
    --max_tokens 12 --cached_text "$out/features"
run python scripts/train_tokenizer.py --data digits --vq --stride 2 --codebook_size 256 --latent_channels 4 \
    --epochs "${TOKENIZER_EPOCHS:-20}" --output_dir "$vq" --resume
run python main_mar.py --preset digits --model maskgil_t2i_tiny --cached_text "$out/features" \
    --tokenizer "diffusers:$vq/autoencoder" --loss_tokens masked --label_smoothing 0 --epochs "${EPOCHS:-120}" --eval_freq 1000 \
    --output_dir "$out/model" --resume "$out/model"
run python sample.py --checkpoint "$out/model" --output_dir "$out/samples" --prompts "$out/prompts.txt" \
    --num_images 800 --eval_bsz 200 --cfg 3 "$@"
samples=("$out"/samples/*_prompts*)
[ ${#samples[@]} = 1 ] || fail "$out/samples has ${#samples[@]} settings, the table is of one: give another OUT"
into "$out/table.md" python scripts/demo_text.py --output_dir "$out" --samples "${samples[0]}"
