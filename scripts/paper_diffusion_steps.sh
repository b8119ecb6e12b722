#!/usr/bin/env bash
# The number of diffusion steps that draw a token, 5 to 1000, for one model: FID and IS against it.
#   IMAGENET_PATH=DIR GPUS=8 bash scripts/paper_diffusion_steps.sh
#       MAR-L, the published weights in CHECKPOINT (pretrained_models/mar/mar_large)
#   PRESET=digits bash scripts/paper_diffusion_steps.sh
#       mar_tiny, trained first unless CHECKPOINT is given
#   STEPS=5,100 …: other numbers. paper_env.sh has the other variables. Further arguments go to sample.py.
source "$(dirname "${BASH_SOURCE[0]}")/paper_env.sh"

if [ "$preset" = digits ]; then
    checkpoint=${CHECKPOINT:-$out/weights}
    [ -n "${CHECKPOINT:-}" ] || run python main_mar.py --preset digits --epochs "$epochs" --output_dir "$checkpoint" \
        --resume "$checkpoint"
    run python sample.py --checkpoint "$checkpoint" --output_dir "$out" \
        --num_sampling_steps "${STEPS:-5,10,25,50,100,250}" --seed "$seeds" --num_images "$num_images" "$@"
else
    run torchrun --nproc_per_node="$gpus" sample.py --checkpoint "${CHECKPOINT:-pretrained_models/mar/mar_large}" \
        --model mar_large --output_dir "$out" --data_path "$data" --cfg 3.0 --num_iter 256 --eval_bsz 256 \
        --num_sampling_steps "${STEPS:-5,10,25,50,100,250,500,1000}" --seed "$seeds" --num_images "$num_images" "$@"
fi
finish "$out/results.jsonl" --metrics fid,is_mean --x num_sampling_steps
