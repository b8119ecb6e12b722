#!/usr/bin/env bash
# The temperature of the diffusion sampler, for one model without and with guidance: FID and IS against it.
#   IMAGENET_PATH=DIR GPUS=8 bash scripts/paper_temperature.sh
#       MAR-L, the published weights in CHECKPOINT (pretrained_models/mar/mar_large)
#   PRESET=digits bash scripts/paper_temperature.sh
#       mar_tiny, trained first unless CHECKPOINT is given
#   TEMPERATURES=0.9,1 …: other temperatures. paper_env.sh has the other variables. Further arguments go to sample.py.
source "$(dirname "${BASH_SOURCE[0]}")/paper_env.sh"

temperatures=${TEMPERATURES:-0.90,0.92,0.94,0.96,0.98,1.00,1.02,1.04}
if [ "$preset" = digits ]; then
    checkpoint=${CHECKPOINT:-$out/weights}
    [ -n "${CHECKPOINT:-}" ] || run python main_mar.py --preset digits --epochs "$epochs" --output_dir "$checkpoint" \
        --resume "$checkpoint"
    run python sample.py --checkpoint "$checkpoint" --output_dir "$out" --cfg 1,1.5 --temperature "$temperatures" \
        --seed "$seeds" --num_images "$num_images" "$@"
else
    run torchrun --nproc_per_node="$gpus" sample.py --checkpoint "${CHECKPOINT:-pretrained_models/mar/mar_large}" \
        --model mar_large --output_dir "$out" --data_path "$data" --cfg 1,3.0 --temperature "$temperatures" \
        --num_iter 256 --num_sampling_steps 100 --eval_bsz 256 --seed "$seeds" --num_images "$num_images" "$@"
fi
finish "$out/results.jsonl" --metrics fid,is_mean --x temperature
