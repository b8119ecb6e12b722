#!/usr/bin/env bash
# Speed against accuracy: 8 to 128 autoregressive steps, FID and IS against images a second (of all GPUs together).
#   IMAGENET_PATH=DIR GPUS=1 bash scripts/paper_speed.sh
#       MAR-B, -L and -H, the published weights in WEIGHTS/mar_base, … (pretrained_models/mar)
#   PRESET=digits bash scripts/paper_speed.sh
#       mar_tiny in 2 to 64 steps, trained first unless CHECKPOINT is given
#   NUM_ITERS=8,64 …: other numbers. paper_env.sh has the other variables. Further arguments go to sample.py.
# The speed is measured: nothing else should run on the machine.
source "$(dirname "${BASH_SOURCE[0]}")/paper_env.sh"

if [ "$preset" = digits ]; then
    checkpoint=${CHECKPOINT:-$out/weights}
    [ -n "${CHECKPOINT:-}" ] || run python main_mar.py --preset digits --epochs "$epochs" --output_dir "$checkpoint" \
        --resume "$checkpoint"
    run python sample.py --checkpoint "$checkpoint" --output_dir "$out" --num_iter "${NUM_ITERS:-2,4,8,16,32,64}" \
        --seed "$seeds" --num_images "$num_images" "$@"
    results=("$out/results.jsonl")
else
    weights=${WEIGHTS:-pretrained_models/mar} results=()
    for model in mar_base mar_large mar_huge; do
        run torchrun --nproc_per_node="$gpus" sample.py --checkpoint "$weights/$model" --model "$model" \
            --output_dir "$out/$model" --data_path "$data" --cfg "$(cfg_of $model)" \
            --num_iter "${NUM_ITERS:-8,16,32,64,128}" --num_sampling_steps 100 --eval_bsz 256 --seed "$seeds" \
            --num_images "$num_images" "$@"
        results+=("$out/$model/results.jsonl")
    done
fi
finish "${results[@]}" --metrics fid,is_mean --x images_per_second
