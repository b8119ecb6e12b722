#!/usr/bin/env bash
# MAR-B, MAR-L and MAR-H: train for 800 epochs, sample in 256 steps without and with guidance, FID and IS.
#   IMAGENET_PATH=DIR GPUS=8 MODELS=mar_base bash scripts/paper_mar.sh
#       from scratch, one of them (default: all three)
#   WEIGHTS=pretrained_models/mar IMAGENET_PATH=DIR GPUS=8 bash scripts/paper_mar.sh
#       the published weights, which scripts/download_weights.py has put into WEIGHTS/mar_base, …
#   PRESET=digits bash scripts/paper_mar.sh
#       mar_tiny on digits, in as many steps as it has tokens
# paper_env.sh has the other variables. Further arguments go to sample.py.
source "$(dirname "${BASH_SOURCE[0]}")/paper_env.sh"

if [ "$preset" = digits ]; then
    weights=${WEIGHTS:-$out/weights}/mar_tiny
    results=("$out/mar_tiny/results.jsonl")
    run python main_mar.py --preset digits --epochs "$epochs" --output_dir "$weights" --resume "$weights"
    run python sample.py --checkpoint "$weights" --output_dir "$out/mar_tiny" --cfg 1,1.5 --num_iter 64 --seed "$seeds" \
        --num_images "$num_images" "$@"
else
    models=${MODELS:-mar_base,mar_large,mar_huge}
    for model in ${models//,/ }; do
        cfg_of "$model" >/dev/null # fails for an unknown name, before hours of training
    done
    results=()
    for model in ${models//,/ }; do
        run=$out/$model weights=${WEIGHTS:-$out/weights}/$model cfg=$(cfg_of "$model")
        results+=("$run/results.jsonl")
        if [ -z "${WEIGHTS:-}" ]; then
            share_batch 2048 64
            run torchrun --nproc_per_node="$gpus" main_mar.py --preset "$model" --data_path "$data" \
                --batch_size "$batch" --accum_iter "$accum" --output_dir "$weights" --resume "$weights"
        fi
        run torchrun --nproc_per_node="$gpus" sample.py --checkpoint "$weights" --model "$model" --output_dir "$run" \
            --data_path "$data" --cfg "1,$cfg" --num_iter 256 --num_sampling_steps 100 --eval_bsz 256 \
            --seed "$seeds" --num_images "$num_images" "$@"
    done
fi
finish "${results[@]}" --metrics fid,is_mean --x cfg
