#!/usr/bin/env bash
# Heads that win: train heads by --objective image on a frozen base, what all images share first, then what differs
# between images, for 4 to 8 steps of 8 diffusion steps at once.
#   BASE=output_dir/quickstart OUT=output_dir/heads bash scripts/train_heads.sh
# Without BASE the quickstart's base is made if it is missing. OUT/steps has the heads without their adaptive part, OUT all
# of them. At most 40 minutes on 2 CPU cores; interrupted, the same command continues. SEED as well; further arguments go
# to main_mar.py, where the last one counts. What the heads are worth: scripts/leaderboard.sh.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

base=${BASE:-output_dir/quickstart}
out=${OUT:-output_dir/heads}
if [[ -z ${BASE:-} ]]; then
    run python main_mar.py --preset digits --output_dir "$base" --resume "$base"
fi
stage() { # FROM TO flags
    local from=$1 to=$2
    shift 2
    run python main_mar.py --preset digits --init_from "$from" --objective image --train_num_iter 4,8 --num_iter 4 \
        --num_sampling_steps 8 --solver dpmpp_sde --cfg 1.8 --temperature 0.9 --reward digits,pixels \
        --reward_weights 1,2 --bank 1024 --no-grad_checkpointing --eval_freq 1000 --seed "${SEED:-1}" \
        --output_dir "$to" --resume "$to" "$@"
}
stage "$base" "$out/steps" --learn tau,cfg,profile --no-adaptive --epochs 10 "$@"
stage "$out/steps" "$out" --learn order,group,tau,cfg,profile --adaptive_lr 0.08 --epochs 24 "$@"
say "heads: $out; without their adaptive part: $out/steps"
