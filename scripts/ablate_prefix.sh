#!/usr/bin/env bash
# A causal model draws the first rows of an image, MaskGIL the rest: FID, seconds an image and evaluations over the share of
# the tokens that the causal one draws and over MaskGIL's steps, three seeds, as a table and a plot.
#   bash scripts/ablate_prefix.sh
#   PRESET=cifar10 DATA=data bash scripts/ablate_prefix.sh
# A VQ tokenizer, a causal model and a MaskGIL are trained first, unless TOKENIZER, CAUSAL and MASKGIL name them. OUT:
# folder (output_dir/ablate_prefix/PRESET). SHARES, STEPS, SEEDS: comma lists. EPOCHS: of both models. Finished parts are
# not run again. Further arguments go to sample.py, such as --prefix_cfg 2 for the causal model.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

preset=${PRESET:-digits}
out=${OUT:-output_dir/ablate_prefix/$preset}
shares=${SHARES:-0,0.0625,0.125,0.25,0.5,1}
case $preset in
    digits)
        shares=${SHARES:-0,0.25,0.5,0.75,1}
        data=(--data digits) stride=2 tokenizer_epochs=20 epochs=${EPOCHS:-40} images=(--num_images 1800)
        ;;
    cifar10)
        data=(--data cifar10 --data_path "${DATA:-data}") stride=4 tokenizer_epochs=10 epochs=${EPOCHS:-60}
        images=(--num_images 10000)
        ;;
    *) fail "unknown PRESET '$preset'; valid: digits, cifar10" ;;
esac
vq=$out/tokenizer
tokenizer=${TOKENIZER:-diffusers:$vq/autoencoder}
causal=${CAUSAL:-$out/causal} maskgil=${MASKGIL:-$out/maskgil}
[ -n "${TOKENIZER:-}" ] || run python scripts/train_tokenizer.py "${data[@]}" --vq --stride "$stride" \
    --codebook_size 256 --latent_channels 4 --epochs "$tokenizer_epochs" --output_dir "$vq" --resume
[ -n "${CAUSAL:-}" ] || run python main_mar.py --preset "$preset" "${data[@]}" --model causal_gpt_tiny \
    --tokenizer "$tokenizer" --cfg 2 --epochs "$epochs" --eval_freq 1000 --output_dir "$causal" --resume "$causal"
[ -n "${MASKGIL:-}" ] || run python main_mar.py --preset "$preset" "${data[@]}" --model maskgil_tiny \
    --tokenizer "$tokenizer" --loss_tokens masked --label_smoothing 0 --cfg 2 --epochs "$epochs" --eval_freq 1000 \
    --output_dir "$maskgil" --resume "$maskgil"
for share in ${shares//,/ }; do
    run python sample.py --checkpoint "$maskgil" --output_dir "$out/samples" --prefix_from "$causal" \
        --prefix_share "$share" --num_iter "${STEPS:-2,4,8}" --seed "${SEEDS:-0,1,2}" "${images[@]}" "$@"
done
into "$out/table.md" python scripts/make_table.py "$out/samples/results.jsonl" --csv "$out/table.csv" \
    --plot "$out/fid_by_evals.png"
