#!/usr/bin/env bash
# MAR-B, MAR-L and MAR-H: train for 800 epochs, sample in 256 steps without and with guidance, FID and IS.
#   IMAGENET_PATH=DIR GPUS=8 MODELS=mar_base bash scripts/paper_mar.sh
#       from scratch, one of them (default: all three)
#   WEIGHTS=pretrained_models/mar IMAGENET_PATH=DIR GPUS=8 bash scripts/paper_mar.sh
#       the published weights, which scripts/download_weights.py has put into WEIGHTS/mar_base, …
#   PRESET=digits bash scripts/paper_mar.sh
#       mar_tiny on digits, in as many steps as it has tokens
# See paper_env.sh for more variables. More arguments go to sample.py.
source "$(dirname "${BASH_SOURCE[0]}")/paper_env.sh"

models=${MODELS:-mar_base,mar_large,mar_huge}
if [ "$preset" = digits ]; then
    models=mar_tiny
fi
for model in ${models//,/ }; do
    case $model in
        mar_tiny | mar_base | mar_large | mar_huge) ;;
        *) fail "unknown model '$model' in MODELS; valid: mar_base, mar_large, mar_huge" ;;
    esac
done
results=()
for model in ${models//,/ }; do
    run=$out/$model weights=${WEIGHTS:-$out/weights}/$model
    results+=("$run/results.jsonl")
    case $model in
        mar_tiny)
            python main_mar.py --preset digits --epochs "$epochs" --output_dir "$weights" --resume "$weights"
            python sample.py --checkpoint "$weights" --output_dir "$run" --cfg 1,1.5 --num_iter 64 --seed "$seeds" \
                --num_images "$num_images" "$@"
            ;;
        mar_base) # published: FID 2.31, IS 281.7 at cfg 2.9; FID 3.48 without
            [ -n "${WEIGHTS:-}" ] || torchrun --nproc_per_node="$gpus" main_mar.py --preset mar_base \
                --data_path "$data" --accum_iter "$accum" --output_dir "$weights" --resume "$weights"
            torchrun --nproc_per_node="$gpus" sample.py --checkpoint "$weights" --model mar_base --output_dir "$run" \
                --data_path "$data" --cfg 1,2.9 --num_iter 256 --num_sampling_steps 100 --eval_bsz 256 \
                --seed "$seeds" --num_images "$num_images" "$@"
            ;;
        mar_large) # published: FID 1.78, IS 296.0 at cfg 3.0
            [ -n "${WEIGHTS:-}" ] || torchrun --nproc_per_node="$gpus" main_mar.py --preset mar_large \
                --data_path "$data" --accum_iter "$accum" --output_dir "$weights" --resume "$weights"
            torchrun --nproc_per_node="$gpus" sample.py --checkpoint "$weights" --model mar_large --output_dir "$run" \
                --data_path "$data" --cfg 1,3.0 --num_iter 256 --num_sampling_steps 100 --eval_bsz 256 \
                --seed "$seeds" --num_images "$num_images" "$@"
            ;;
        mar_huge) # published: FID 1.55, IS 303.7 at cfg 3.2
            [ -n "${WEIGHTS:-}" ] || torchrun --nproc_per_node="$gpus" main_mar.py --preset mar_huge \
                --data_path "$data" --accum_iter "$accum" --output_dir "$weights" --resume "$weights"
            torchrun --nproc_per_node="$gpus" sample.py --checkpoint "$weights" --model mar_huge --output_dir "$run" \
                --data_path "$data" --cfg 1,3.2 --num_iter 256 --num_sampling_steps 100 --eval_bsz 256 \
                --seed "$seeds" --num_images "$num_images" "$@"
            ;;
    esac
done
finish "${results[@]}" --metrics fid,is_mean --x cfg
