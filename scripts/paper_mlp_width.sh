#!/usr/bin/env bash
# The width of the denoising MLP: one training run for each (and for each seed), FID and IS without and with guidance.
#   IMAGENET_PATH=DIR GPUS=8 bash scripts/paper_mlp_width.sh
#       MAR-L with 3 blocks of width 256, 512, 1024, 1536; 400 epochs
#   PRESET=digits bash scripts/paper_mlp_width.sh
#       mar_tiny with 3 blocks of width 16, 32, 64, 128
#   WIDTHS=256,1024 …: other widths. paper_env.sh has the other variables. Further arguments go to main_mar.py.
source "$(dirname "${BASH_SOURCE[0]}")/paper_env.sh"

widths=${WIDTHS:-256,512,1024,1536}
if [ "$preset" = digits ]; then
    widths=${WIDTHS:-16,32,64,128}
else
    share_batch 2048 64
fi
results=()
for width in ${widths//,/ }; do
    run=$out/width_$width
    results+=("$run/results.jsonl")
    for seed in ${seeds//,/ }; do
        weights=$out/weights/width_${width}_seed_$seed
        if [ "$preset" = digits ]; then
            run python main_mar.py --preset digits --diffloss_w "$width" --epochs "$epochs" --seed "$seed" \
                --output_dir "$weights" --resume "$weights" "$@"
            run python sample.py --checkpoint "$weights" --output_dir "$run" --cfg 1,1.5 --seed "$seed" \
                --num_images "$num_images"
        else
            run torchrun --nproc_per_node="$gpus" main_mar.py --preset mar_large --diffloss_d 3 --diffloss_w "$width" \
                --epochs 400 --data_path "$data" --batch_size "$batch" --accum_iter "$accum" --seed "$seed" \
                --output_dir "$weights" --resume "$weights" "$@"
            run torchrun --nproc_per_node="$gpus" sample.py --checkpoint "$weights" --output_dir "$run" \
                --data_path "$data" --cfg 1,3.0 --num_iter 256 --num_sampling_steps 100 --eval_bsz 256 \
                --seed "$seed" --num_images "$num_images"
        fi
    done
done
finish "${results[@]}" --metrics fid,is_mean --x run
